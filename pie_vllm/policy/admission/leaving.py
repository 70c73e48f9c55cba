"""What is kept of a request that gives its blocks back, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pie_vllm.policy.placement.residency import Residency


def forget_unfilled(residency: Residency, table: Sequence[Any], full: int) -> None:
    """Take blocks that hold no KV yet out of the prefix cache.

    vLLM caches a block in the step that fills it, before it runs
    (v1/core/kv_cache_manager.py:612): if the request is preempted in that very step, it is never
    filled.

    Args:
        residency: whose blocks.
        table: of the request.
        full: its blocks whose KV is complete.
    """
    for block in table[full:]:
        if block.ref_cnt == 1 and block.block_hash is not None:
            residency.entries.drop(block)


def keep_tail(
    residency: Residency, request_id: str, table: Sequence[Any], computed: int, block_size: int
) -> None:
    """Park the first block of a preempted request that the prefix cache does not know.

    Args:
        residency: whose blocks.
        request_id: of the request.
        table: its blocks.
        computed: its tokens whose KV is complete.
        block_size: tokens of a block.
    """
    index = next((i for i, b in enumerate(table) if b.block_hash is None), len(table))
    tokens = min(computed, (index + 1) * block_size)
    if tokens > index * block_size and table[index].block_id < residency.boundary:
        residency.parking.keep_tail(request_id, table[index], index, tokens)

"""Keys of parked KV, for vLLM's requests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import Request


def keys_behind(
    request: Request, hits: int, block_size: int, tokens_max: int | None
) -> Iterator[Any]:
    """Keys of the full blocks behind the first ``hits`` of a waiting request.

    As ``FullAttentionManager.find_longest_cache_hit`` reads them,
    v1/core/single_type_kv_cache_manager.py:784 in 0.32.

    Args:
        request: Waiting, with prefix caching.
        hits: Number of blocks that vLLM found.
        block_size: Tokens of a block.
        tokens_max: Maximum number of tokens that are found; None is all but the last.
    """
    last = request.num_tokens - 1
    end = (last if tokens_max is None else min(tokens_max, last)) // block_size
    for block_hash in islice(request.block_hashes, hits, end):
        yield make_block_hash_with_group_id(block_hash, 0)

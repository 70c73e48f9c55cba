"""Keys of parked KV, for vLLM's requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice, repeat
from operator import add
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.request import Request


@cache
def _suffix(group: int) -> bytes:
    """What makes a key of a block's hash: vLLM appends the number of the group, in bytes."""
    return bytes(make_block_hash_with_group_id(BlockHash(b""), group))


def findable_blocks(request: Request, block_size: int, tokens_max: int | None) -> int:
    """Number of first blocks of a waiting request that may be found full.

    Args:
        request: Waiting.
        block_size: Tokens of a block.
        tokens_max: Maximum number of tokens that are found; None is all but the last.
    """
    last = request.num_tokens - 1
    return int((last if tokens_max is None else min(tokens_max, last)) // block_size)


def hash_keys(request: Request, hits: int, end: int, group: int = 0) -> Iterator[Any]:
    """Keys of the blocks from ``hits`` up to ``end`` of a waiting request, by their contents.

    As ``FullAttentionManager.find_longest_cache_hit`` reads them,
    v1/core/single_type_kv_cache_manager.py:784 in 0.32.
    """
    return map(add, islice(request.block_hashes, hits, end), repeat(_suffix(group)))

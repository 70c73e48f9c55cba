"""Keys of parked KV, for vLLM's requests, and the tokens that it was computed of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, repeat
from operator import add
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.request import Request

from pie_vllm.policy.pool.ended_requests import TokensOf


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


def tokens_of(request: Request, most: int) -> TokensOf:
    """Gives tokens of a request's first ``most``, as far as its KV depends on nothing but these.

    It depends on images and embeddings, too, where a block's key is not made of tokens alone:
    ``generate_block_hash_extra_keys``, v1/core/kv_cache_utils.py:632 in 0.32. Adapters and salts
    are in the key of a block in front already.
    """

    def tokens(first: int, end: int) -> Sequence[int] | None:
        images = (feature.mm_position for feature in request.mm_features)
        if (
            end > most
            or request.prompt_embeds is not None
            or any(i.offset < end and i.offset + i.length > first for i in images)
        ):
            return None
        found: list[int] = request.all_token_ids[first:end]
        return found

    return tokens

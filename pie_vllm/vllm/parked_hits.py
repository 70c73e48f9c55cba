"""Prefix hits on parked KV: what of a waiting request's tokens need not be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import Request

from pie_vllm.policy.geometry import cdiv
from pie_vllm.policy.residency import Residency
from pie_vllm.policy.restoring import ParkedKey


class ParkedHits(NamedTuple):
    """What follows on vLLM's own hits of a waiting request.

    Attributes:
        found: blocks, and keys of parked ones, in the order of the request's table.
        parked: how many of them are parked.
        residents: of the parked ones, how many get resident pages, the first ones.
        full_tokens: in vLLM's hits and these.
        tokens: with those of the request's tail, if that is restored too.
        cut: whether more is parked than there is room for now.
    """

    found: list[Any]
    parked: int
    residents: int
    full_tokens: int
    tokens: int
    cut: bool

    @property
    def tail_tokens(self) -> int:
        """Tokens of the block after ``found`` that are restored too."""
        return self.tokens - self.full_tokens


class Room(NamedTuple):
    """What an admission may use.

    Attributes:
        residents: free ones.
        pooled: ids that may come in use.
        chunk_blocks: blocks that one step may fill with prompt tokens.
    """

    residents: int
    pooled: int
    chunk_blocks: int


class ParkedLookup:
    """Finds parked hits; changes nothing but the order in which free blocks are reused."""

    def __init__(self, residency: Residency, block_pool: Any, block_size: int) -> None:
        """Over the manager's parts."""
        self._residency = residency
        self._pool = block_pool
        self._block_size = block_size

    def find(self, request: Request, hits: Sequence[Any], room: Room) -> ParkedHits | None:
        """The parked blocks behind vLLM's own ``hits``; None where there are none.

        Args:
            request: waiting, with prefix caching.
            hits: blocks that vLLM found.
            room: for the admission as a whole.
        """
        parking = self._residency.parking
        size, count = self._block_size, len(hits)
        found = self._search(request, count, (request.num_tokens - 1) // size)
        parked = sum(isinstance(block, ParkedKey) for block in found)
        tail, full = parking.tail_of(request.request_id), (count + len(found)) * size
        tokens = full
        if tail is not None and tail.index * size == full:
            tokens = max(full, min(tail.tokens, request.num_tokens - 1))
        if not parked and tokens == full:
            return None
        blocks = cdiv(request.num_tokens, size) - count
        idle = [b for b in (*hits, *found) if not isinstance(b, ParkedKey) and not b.ref_cnt]
        self._residency.queue.freshen(idle)
        pooled = sum(block.block_id >= self._residency.boundary for block in idle)
        free = Room(
            room.residents - len(idle) + pooled, max(0, room.pooled - pooled), room.chunk_blocks
        )
        residents = _residents_for(parked, blocks - len(found), free)
        if parked - residents <= free.pooled:
            return ParkedHits(found, parked, residents, full, tokens, False)
        # What is left out has to be computed, which takes residents.
        residents = _residents_for(parked, blocks, free)
        parked = min(parked, residents + free.pooled)
        found = first_of(found, parked)
        full = (count + len(found)) * size
        return ParkedHits(found, parked, residents, full, full, True)

    def _search(self, request: Request, first: int, end: int) -> list[Any]:
        """Cached and parked blocks of a request's table from ``first`` on, up to a gap or the end.

        As ``FullAttentionManager.find_longest_cache_hit``, which stops at the first block that is
        not cached, v1/core/single_type_kv_cache_manager.py:784.
        """
        cached, parking = self._pool.cached_block_hash_to_block, self._residency.parking
        found: list[Any] = []
        for block_hash in islice(request.block_hashes, first, end):
            key = make_block_hash_with_group_id(block_hash, 0)
            block = cached.get_one_block(key)
            if block is not None:
                found.append(block)
            elif parking.has(key):
                found.append(ParkedKey(key))
            else:
                break
        return found


def _residents_for(parked: int, computed: int, room: Room) -> int:
    """Of parked blocks, those that free residents hold beside the blocks that are computed."""
    return min(parked, max(0, room.residents - min(computed, room.chunk_blocks + 1)))


def first_of(found: list[Any], parked: int) -> list[Any]:
    """The first of ``found``, with so many parked blocks."""
    for index, block in enumerate(found):
        if isinstance(block, ParkedKey):
            if not parked:
                return found[:index]
            parked -= 1
    return found

"""Prefix hits on parked KV: what of a waiting request's tokens need not be computed again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.restore import ParkedKey, first_of
from pie_vllm.policy.placement.residency import Residency


class ParkedHits(NamedTuple):
    """What follows on the hits of a waiting request that have blocks.

    Attributes:
        found: blocks, and keys of parked ones, in the order of the request's table.
        parked: how many of them are parked.
        residents: of the parked ones, how many get resident pages, the first ones.
        full_tokens: in the hits before and these.
        tokens: with those of the request's tail, if that is restored too.
        cut: whether more is parked than there is room for now, or than this step can copy back.
    """

    found: list[Any]
    parked: int
    residents: int
    full_tokens: int
    tokens: int
    cut: bool

    @classmethod
    def none(cls, tokens: int) -> ParkedHits:
        """Nothing follows on hits of so many tokens."""
        return cls([], 0, 0, tokens, tokens, False)

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

    def __init__(self, residency: Residency, cached: Callable[[Any], Any], block_size: int) -> None:
        """Over the manager's parts; ``cached`` gives the block of a key, or None."""
        self._residency = residency
        self._cached = cached
        self._block_size = block_size

    def find(
        self,
        request_id: str,
        num_tokens: int,
        keys: Iterable[Hashable],
        hits: Sequence[Any],
        room: Room,
        with_tail: bool = True,
    ) -> ParkedHits | None:
        """The parked blocks behind the ``hits`` that have blocks; None where there are none.

        Args:
            request_id: of a waiting request, with prefix caching.
            num_tokens: that it has, the last of which is computed anyway.
            keys: of its blocks after ``hits`` that are full without that token.
            hits: blocks that were found cached.
            room: for the admission as a whole.
            with_tail: whether the hit may end within a block, with the request's tail.
        """
        parking = self._residency.parking
        size, count = self._block_size, len(hits)
        found, soon = self._search(keys)
        parked = sum(isinstance(block, ParkedKey) for block in found)
        tail = parking.tails.find(request_id) if with_tail else None
        full = (count + len(found)) * size
        tokens = full
        if tail is not None and tail.index * size == full:
            tokens = max(full, min(tail.tokens, num_tokens - 1))
        if not parked and tokens == full and not soon:
            return None
        blocks = cdiv(num_tokens, size) - count
        idle = [b for b in (*hits, *found) if not isinstance(b, ParkedKey) and not b.ref_cnt]
        self._residency.queue.freshen(idle)
        pooled = sum(block.block_id >= self._residency.boundary for block in idle)
        free = Room(
            room.residents - len(idle) + pooled, max(0, room.pooled - pooled), room.chunk_blocks
        )
        residents = _residents_for(parked, blocks - len(found), free)
        if parked - residents <= free.pooled:
            return ParkedHits(found, parked, residents, full, tokens, soon)
        # What is left out has to be computed, which takes residents.
        residents = _residents_for(parked, blocks, free)
        parked = min(parked, residents + free.pooled)
        found = first_of(found, parked)
        full = (count + len(found)) * size
        return ParkedHits(found, parked, residents, full, full, True)

    def _search(self, keys: Iterable[Hashable]) -> tuple[list[Any], bool]:
        """Cached and parked blocks of a request's table, up to a gap or the end.

        And whether the gap is only for this step: KV that it stores can be copied back by the next.
        """
        parking = self._residency.parking
        found: list[Any] = []
        for key in keys:
            block = self._cached(key)
            if block is not None:
                found.append(block)
            elif parking.has(key):
                found.append(ParkedKey(key))
            else:
                return found, parking.parked(key)
        return found, False


def _residents_for(parked: int, computed: int, room: Room) -> int:
    """Of parked blocks, those that free residents hold beside the blocks that are computed."""
    return min(parked, max(0, room.residents - min(computed, room.chunk_blocks + 1)))

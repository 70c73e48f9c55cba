"""The free blocks of both tiers, behind the interface of vLLM's free queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice, takewhile
from operator import attrgetter
from typing import Protocol

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.block import Block
from pie_vllm.policy.placement.blank_ids import BlankIds
from pie_vllm.policy.placement.interfaces import FreeList

GAP_SHARE = 32
GAP_MIN = 16
"""Length of the longest gap of blank ids below which idle cached ids are dropped to get a longer
one; in a window below ``GAP_MIN * GAP_SHARE`` ids, a ``GAP_SHARE``-th of the window."""

DROPPED_AT_ONCE = 32
"""Number of idle cached ids dropped for a longer gap. The oldest are mostly those of one request,
which lie together."""


class FreeObserver(Protocol):
    """Told of what the queue does to blocks, and asked for residents."""

    def make_residents_free(self, count: int) -> None:
        """Demote until ``count`` more residents are free."""

    def on_reused(self, blocks: Sequence[Block]) -> None:
        """Idle cached resident blocks are in use again (prefix hits)."""

    def on_residents_freed(self, blocks: Sequence[Block]) -> None:
        """Nobody uses these resident blocks any more."""

    def on_evicted(self, blocks: Sequence[Block]) -> None:
        """Free resident blocks that are cached are handed to another use."""

    def on_pooled_dropped(self, block: Block) -> None:
        """A pooled id is handed to another use, or its KV is of no use to anybody."""


class TieredFreeBlockQueue:
    """Free blocks of two tiers with the interface of vLLM's free queue.

    Allocation (``popleft``, ``popleft_n``) hands out resident blocks only;
    where too few are free, blocks in use are demoted then and there. Pooled
    blocks are handed out to demotion only (``take_pooled``).

    ``num_free_blocks`` says what can physically be had now. With ``FR`` free
    residents, ``FP`` free pooled ids and ``D`` residents in use that could be
    demoted: ``FR + min(FP, D)``. While a waiting request is looked at,
    ``admission(...)`` corrects the number for its prefix hits.

    Attributes:
        num_free_blocks: Number of blocks that can be had now; a plain attribute because vLLM
            reads it once per request and step.
        free_pooled: Number of pooled ids that hold no KV in use: blank ones and idle cached ones.
        available_pooled: Number of pooled ids that demotion can have, ``FP``: ``free_pooled``
            without those that are withheld.
        frozen: Whether nothing may be demoted now, so that ``FP`` counts as 0. Call ``refresh``
            after a change.
        demotable: Number of residents in use that are known to be complete, ``D``.
        withheld: Number of pooled ids that may not be used now, for want of CPU memory. Call
            ``refresh`` after a change.
        missing: Number of withheld ids whose memory is not on its way either.
        taken: Number of residents taken out of the free list, less those put at its front. While
            it grows by less than the blocks that stood before one, that one is free still.
        turnover: Number of times that cached blocks came in use or became idle.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        resident_blocks: int,
        make_list: Callable[[list[Block]], FreeList],
        observer: FreeObserver,
        key_of: Callable[[Block], Hashable | None] = attrgetter("block_hash"),
    ) -> None:
        """Start with all ``blocks`` free.

        Args:
            blocks: All blocks, ``blocks[i].block_id == i``.
            resident_blocks: Number of resident blocks; ids below it are resident.
            make_list: Makes the list of one tier; vLLM's own queue class.
            observer: Told of what happens to blocks, and asked for residents.
            key_of: The key of a block in the prefix cache, or None.
        """
        self._blocks = blocks
        self._boundary = resident_blocks
        self._observer = observer
        self._key_of = key_of
        self._resident = make_list(list(blocks[:resident_blocks]))
        self._cached = make_list([])
        self._hit: set[int] = set()  # Pooled ids that a waiting request has found.
        self._blank = BlankIds(len(blocks) - resident_blocks)
        self._gap_min = min(GAP_MIN, (len(blocks) - resident_blocks) // GAP_SHARE)
        self.demotable = 0
        self.frozen = False
        self.withheld = self.missing = self.taken = self.turnover = 0
        self.num_free_blocks = self.free_pooled = self.available_pooled = 0
        self._hits = 0
        self._reserve = 0
        self.refresh()

    @property
    def free_residents(self) -> int:
        """Number of resident blocks that nobody uses."""
        return self._resident.num_free_blocks

    @property
    def free_in_all(self) -> int:
        """Number of free blocks of both tiers."""
        return self.free_residents + self.free_pooled

    @property
    def available_in_all(self) -> int:
        """Number of free blocks of both tiers, without those that are missing."""
        there = self._blank.num_free - self.missing
        return self.free_residents + self._cached.num_free_blocks + max(there, 0)

    def refresh(self) -> None:
        """Recompute ``num_free_blocks`` and the counts of pooled ids after a change."""
        free = self._resident.num_free_blocks
        blank, cached = self._blank.num_free, self._cached.num_free_blocks
        self.free_pooled = blank + cached
        blank -= self.withheld
        self.available_pooled = cached + (blank if blank > 0 else 0)
        pooled = 0 if self.frozen else self.available_pooled
        reachable = self.demotable + self._hits - self._reserve
        self.num_free_blocks = free + (pooled if pooled < reachable else reachable)

    def admission(self, hits: int = 0, reserve: int = 0) -> None:
        """Set the terms for the waiting request that is looked at now.

        vLLM counts the request's idle prefix hits as blocks it takes, though
        they need no resident: ``hits`` of them are given back, and ``reserve``
        residents are kept for chunks of prompts that are under way. Then
        ``num_free_blocks = min(FR + D + hits - reserve, FR + FP)``. Call it
        without arguments when done.
        """
        self._hits = hits
        self._reserve = reserve
        self.refresh()

    def on_terms(self, hits: int, reserve: int, pooled: int) -> int:
        """``num_free_blocks`` as ``admission(hits, reserve)`` makes it; changes nothing.

        Args:
            hits: As ``admission``.
            reserve: As ``admission``.
            pooled: Number of pooled ids that may be had beyond ``available_pooled``.
        """
        more = 0 if self.frozen else self.available_pooled + pooled
        return self.free_residents + min(more, self.demotable + hits - reserve)

    def popleft(self) -> Block:
        """Take one resident block. Raises ValueError when none can be had."""
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Block]:
        """Take ``n`` resident blocks, demoting where too few are free.

        Raises:
            ValueError: that many cannot be had.
        """
        resident = self._resident
        if n > resident.num_free_blocks:
            self._observer.make_residents_free(n - resident.num_free_blocks)
            if n > resident.num_free_blocks:
                raise ValueError("No free blocks available")
        self.num_free_blocks -= n
        self.taken += n
        blocks = resident.popleft_n(n)
        key_of = self._key_of
        if n == 1:  # As for each running request at the end of a block.
            if key_of(blocks[0]) is not None:
                self._observer.on_evicted(blocks)
            return blocks
        keys = [*map(key_of, blocks)]
        if None not in keys:
            self._observer.on_evicted(blocks)
        elif cached := [b for b, key in zip(blocks, keys, strict=True) if key is not None]:
            self._observer.on_evicted(cached)
        return blocks

    def take_pooled(self, place: int, *, with_row: bool = False) -> Block:
        """Take a pooled block for a demotion, or for a row that is there already.

        A blank one, beside that of the neighbour in the chain if it can be had. Where there is
        none, or no gap for a run, the idle cached ones that were used least recently lose theirs.
        """
        block = self._take_pooled(place, with_row)
        self.refresh()
        return block

    def take_pooled_n(self, place: int, count: int) -> list[Block]:
        """As ``take_pooled`` for so many places, from the first one on."""
        blocks = [self._take_pooled(each, False) for each in range(place, place + count)]
        self.refresh()
        return blocks

    def _take_pooled(self, place: int, with_row: bool) -> Block:
        blank, dropped = self._blank, None
        if blank.num_free <= (0 if with_row else self.withheld):
            dropped = self._drop_oldest()
        slot = blank.beside(place)
        if slot is None and (self.withheld or not self._gap_min):
            slot = dropped
        if slot is None:
            slot, length = blank.longest_gap()
            if length < self._gap_min and self._drop_more():
                slot, _ = blank.longest_gap()
        blank.take(slot, place)
        return self._blocks[self._boundary + slot]

    def _drop_more(self) -> bool:
        """Drop the KV of some of the oldest idle cached pooled blocks, so that gaps get longer.

        Returns:
            Whether there were any. Those that a waiting request has found stay, and all stay while
            blank ids are withheld: the cached ones are not.
        """
        if self.withheld:
            return False
        oldest = list(islice(self._cached.iter_blocks_after(None), DROPPED_AT_ONCE))
        oldest = list(takewhile(lambda block: block.block_id not in self._hit, oldest))
        for _ in oldest:
            self._drop_oldest()
        return bool(oldest)

    def _drop_oldest(self) -> int:
        """The idle cached pooled block that was used least recently is blank; returns its slot."""
        block = self._cached.popleft()
        self._drop(block)
        return block.block_id - self._boundary

    def _drop(self, block: Block) -> None:
        """A pooled block that is in no list is blank."""
        self._observer.on_pooled_dropped(block)
        self._blank.give(block.block_id - self._boundary)

    def forget_cached_pooled(self) -> None:
        """Drop the KV of all pooled blocks that nobody uses."""
        while self._cached.num_free_blocks:
            self._drop_oldest()
        self.refresh()

    def freshen(self, blocks: Sequence[Block]) -> None:
        """Make those of the blocks that are free the last to be reused; changes nothing else.

        Until the next call they are not dropped for the sake of longer gaps.
        """
        self._hit = {block.block_id for block in blocks if block.block_id >= self._boundary}
        free = [block for block in blocks if block.ref_cnt == 0]
        residents = [block for block in free if block.block_id < self._boundary]
        pooled = [block for block in free if block.block_id >= self._boundary]
        for tier, moved in ((self._resident, residents), (self._cached, pooled)):
            for block in moved:
                tier.remove(block)
            tier.append_n(moved)

    def give_blank(self, blocks: Sequence[Block]) -> None:
        """Give back pooled blocks that hold no KV."""
        for block in blocks:
            self._blank.give(block.block_id - self._boundary)
        self.refresh()

    def remove(self, block: Block) -> None:
        """Take a given free block out: a prefix hit on idle cached KV."""
        self.remove_n([block])

    def remove_n(self, blocks: Sequence[Block]) -> None:
        """Take given free blocks out: prefix hits on idle cached KV."""
        residents = [block for block in blocks if block.block_id < self._boundary]
        deque(map(self._resident.remove, residents), maxlen=0)
        if len(residents) < len(blocks):
            for block in blocks:
                if block.block_id >= self._boundary:
                    self._cached.remove(block)
        self._observer.on_reused(residents)
        self.taken += len(residents)
        self.turnover += 1
        self.refresh()

    def append(self, block: Block) -> None:
        """Put one block back as the last to be reused."""
        self.append_n([block])

    def append_n(self, blocks: list[Block]) -> None:
        """Put back blocks that are to be reused last: their KV is cached."""
        self.turnover += bool(blocks)
        residents = self._freed_residents(blocks)
        self._resident.append_n(residents)
        if len(residents) < len(blocks):
            self._cached.append_n([b for b in blocks if b.block_id >= self._boundary])
        self.refresh()

    def prepend_n(self, blocks: list[Block]) -> None:
        """Put back blocks that are to be reused first: their KV is of no use."""
        residents = self._freed_residents(blocks)
        self._resident.prepend_n(residents)
        self.taken -= len(residents)
        for block in blocks:
            if block.block_id >= self._boundary:
                self._drop(block)
        self.refresh()

    def _freed_residents(self, blocks: list[Block]) -> list[Block]:
        residents = [b for b in blocks if b.block_id < self._boundary]
        if residents:
            self._observer.on_residents_freed(residents)
        return residents

    def get_all_free_blocks(self) -> list[Block]:
        """All free blocks: residents, then idle cached pooled ones, then blank ones."""
        return [
            *self._resident.get_all_free_blocks(),
            *self._cached.get_all_free_blocks(),
            *(self._blocks[self._boundary + slot] for slot in self._blank.free_slots()),
        ]

    def next_reused(self, count: int) -> Iterator[Block]:
        """The free residents that are handed out next."""
        return islice(self._resident.iter_blocks_after(None), count)

    def iter_blocks_after(self, cursor: Block | None) -> Iterator[Block]:
        """Not offered: only vLLM's offloading connectors use it, and they are refused."""
        raise NotImplementedError("pie's free queue cannot be walked by a KV connector")

    def is_blank(self, block_id: int) -> bool:
        """Whether a pooled id is free and holds no KV."""
        return self._blank.is_free(block_id - self._boundary)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the lists and counts agree."""
        free = self.get_all_free_blocks()
        ids = [b.block_id for b in free]
        if len(set(ids)) != len(ids) or len(ids) != self.free_in_all:
            raise IntegrityError("a block is twice in the free lists, or a count is off")
        if any(b.ref_cnt for b in free):
            raise IntegrityError("a block in use is in a free list")
        self._blank.check_integrity()
        before = self.num_free_blocks
        self.refresh()
        if before != self.num_free_blocks:
            raise IntegrityError(f"num_free_blocks was {before}, is {self.num_free_blocks}")

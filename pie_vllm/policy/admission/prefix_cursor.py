"""How far the blocks of a waiting request were looked up, and what was found."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice, takewhile
from typing import Any

from pie_vllm.policy.admission.restore import ParkedKey, num_parked, parked_keys, stand_ins
from pie_vllm.policy.placement.interfaces import Cached
from pie_vllm.policy.placement.residency import Residency

KEYS_AT_ONCE = 128
"""Number of keys looked up together: one by one they cost several times as much. The first key of a
look comes alone, because most requests have nothing parked."""

FRESHEN_SHARE = 4
"""Divisor of the request's idle blocks: so many others must stand behind them in the order of reuse
before they are made the youngest again, which then costs a few blocks' time for each of those."""


class PrefixCursor:
    """The blocks of one waiting request that are cached or parked, from the first one on.

    A request that is refused keeps its cursor: the next look goes on where this one ended, and
    from the first block that changed meanwhile (``WatchedKeys``). A look costs the same then,
    however much was found.

    Attributes:
        name: Request and state of the tokens that were looked up.
        hits: Cached blocks from the first one on; changed in place once the cursor is kept.
        behind: Blocks, and keys of parked ones, that follow; the first one is parked.
        parked: Number of keys among them.
        gap: Key of the next block if it is neither cached nor to be restored now, else None.
        more: Whether the last look ended before it came to a gap or to the end.
        kept: Whether the request was refused, so that the cursor is asked again.
    """

    def __init__(
        self,
        residency: Residency,
        cached: Cached,
        name: tuple[str, object],
        keys: Iterable[Hashable],
        hits: Sequence[Any],
    ) -> None:
        """Start behind the ``hits``; ``keys`` are those of the blocks that follow, read on demand.

        Args:
            residency: Where blocks live.
            cached: Looks keys up in the prefix cache.
            name: Request and state of its tokens.
            keys: Keys of its full blocks after ``hits``.
            hits: Blocks found in the prefix cache.
        """
        self._queue, self._parking = residency.queue, residency.parking
        self._boundary, self._cached = residency.boundary, cached
        self.name = name
        self.hits: Any = hits
        self.behind: list[Any] = []
        self.parked = 0
        self.gap: Hashable | None = None
        self.more = self.kept = False
        self._keys = iter(keys)
        self._again: deque[Hashable] = deque()  # Keys to look up before those.
        self._counted: int | None = None  # The queue's turnover when idle blocks were counted.
        self._idle = self._idle_hits = self._idle_pooled = 0
        self._safe = self._queue.taken  # What the queue's count is when the first of ours may go.

    # Looking.

    def extend(self, keys_max: int | None) -> int:
        """Look on, at so many keys at most; None for no bound.

        Returns:
            How many blocks were found.
        """
        if self.gap is not None:
            if not (self._parking.has(self.gap) or any(self._cached((self.gap,)))):
                return 0
            self._again.appendleft(self.gap)
            self.gap = None
        found: list[Any] = []
        looked: list[Hashable] = []
        count = 1
        while self.gap is None:
            count = count if keys_max is None else min(count, keys_max - len(found))
            keys = self._next_keys(count)
            if not keys:
                break
            blocks = self._look(keys)
            found += blocks
            looked += keys[: len(blocks)]
            if len(blocks) < len(keys):
                self.gap = keys[len(blocks)]
                self._again.extendleft(reversed(keys[len(blocks) + 1 :]))
            elif len(keys) < count:
                break
            count = KEYS_AT_ONCE
        self.more = keys_max is not None and len(found) >= keys_max
        if found:
            self._put(found, looked)
        return len(found)

    def _next_keys(self, count: int) -> list[Hashable]:
        """So many of the keys to look up, or all that are left."""
        again = self._again
        keys = [again.popleft() for _ in range(min(count, len(again)))]
        keys += islice(self._keys, count - len(keys))
        return keys

    def _look(self, keys: Sequence[Hashable]) -> list[Any]:
        """What stands for these keys, up to one that is neither cached nor to be restored now."""
        blocks = self._cached(keys)
        if all(blocks):
            return blocks
        parking = self._parking
        rows: list[Any] = [*map(parking.row_of, keys)]
        if None not in rows and not any(blocks) and parking.can_restore(rows):
            return stand_ins(keys)
        found: list[Any] = []
        for key, block, row in zip(keys, blocks, rows, strict=True):
            if block is None and (row is None or not parking.can_restore((row,))):
                break
            found.append(ParkedKey(key) if block is None else block)
        return found

    def _put(self, found: list[Any], keys: list[Hashable]) -> None:
        parked = num_parked(found)
        self.parked += parked
        if parked < len(found):
            self._counted, self._safe = None, self._queue.taken
        if self.kept:
            self._parking.watched.add(keys)
            self._parking.touch(keys[::-1])
        self.behind += found
        if self.kept:
            self._join()

    def _join(self) -> None:
        """Cached blocks at the front of ``behind`` are hits."""
        if isinstance(self.behind[0], ParkedKey):
            return
        front = [*takewhile(lambda block: not isinstance(block, ParkedKey), self.behind)]
        if front:
            self.hits += front
            del self.behind[: len(front)]

    # Remembering.

    def keep(self) -> None:
        """The request is refused: watch what was found until it is asked again."""
        if self.kept:
            return
        self.kept = True
        self.hits = list(self.hits)
        watched, keys = self._parking.watched, parked_keys(self.behind)
        watched.clear()
        watched.add(block.block_hash for block in self.hits)
        if len(keys) == len(self.behind):
            watched.add(keys)
        else:
            watched.add(b.key if isinstance(b, ParkedKey) else b.block_hash for b in self.behind)
        self._parking.touch(keys[::-1])

    def drop(self) -> None:
        """The cursor is of no use any more."""
        if self.kept:
            self._parking.watched.clear()

    def settle(self) -> None:
        """Give up what was found from the first block on that changed since."""
        watched, place = self._parking.watched, self._parking.watched.first_changed
        if place is None:
            return
        if self.gap is not None:
            self._again.appendleft(self.gap)
            self.gap = None
        self._again.extendleft(reversed(watched.cut()))
        hits = len(self.hits)
        del self.hits[place:]
        gone = self.behind[max(place - hits, 0) :]
        del self.behind[max(place - hits, 0) :]
        self.parked -= num_parked(gone)
        self._counted, self.more = None, True

    def still_parked(self, blocks: int) -> bool:
        """Whether none of the next parked blocks was computed anew by another request meanwhile.

        Where one was, what was found from it on is given up.
        """
        keys = parked_keys(self.behind[:blocks])
        cached = self._cached(keys)
        if not any(cached):
            return True
        self._parking.watched.changed(next(k for k, b in zip(keys, cached, strict=True) if b))
        return False

    def restored(self, blocks: Sequence[Any]) -> None:
        """The first entries of ``behind`` are these blocks now, which nobody uses."""
        gone, others = self.behind[: len(blocks)], 0
        back = num_parked(gone)
        if back < len(gone):
            others = sum(not isinstance(b, ParkedKey) and not b.ref_cnt for b in gone)
        del self.behind[: len(blocks)]
        self.hits += blocks
        self.parked -= back
        self._idle += back
        self._idle_hits += back + others
        self._counted = self._queue.turnover

    # What nobody uses.

    @property
    def idle_hits(self) -> int:
        """Number of ``hits`` that nobody uses."""
        self._count()
        return self._idle_hits

    @property
    def idle(self) -> int:
        """Number of found blocks that nobody uses."""
        self._count()
        return self._idle

    @property
    def idle_pooled(self) -> int:
        """Number of these that are pooled."""
        self._count()
        return self._idle_pooled

    def _count(self) -> None:
        if self._counted == self._queue.turnover:
            return
        self._counted = self._queue.turnover
        hits = [block.block_id for block in self.hits if not block.ref_cnt]
        behind = []
        if self.parked < len(self.behind):
            others = (b for b in self.behind if not isinstance(b, ParkedKey))
            behind = [b.block_id for b in others if not b.ref_cnt]
        boundary = self._boundary
        self._idle_hits, self._idle = len(hits), len(hits) + len(behind)
        self._idle_pooled = sum(i >= boundary for i in hits) + sum(i >= boundary for i in behind)

    def protect(self, residents: int, next_step: int) -> None:
        """Make sure that none of these blocks is among the free residents handed out next.

        Args:
            residents: Number of residents to be taken now.
            next_step: Number of residents that the next step may take, for which the blocks are
                made young again if that is cheap.
        """
        queue = self._queue
        ahead = self._safe - queue.taken
        idle = self.idle - self.idle_pooled
        if not idle:
            return
        others = queue.free_residents - idle - ahead
        danger = self.kept and ahead < next_step and others * FRESHEN_SHARE >= idle
        if ahead < residents or danger:
            self.freshen()

    def freshen(self) -> None:
        """Make all of them the last to be reused, the last one of the table first of all."""
        found = (*self.hits, *self.behind)
        idle = [b for b in found if not isinstance(b, ParkedKey) and not b.ref_cnt]
        self._queue.freshen(idle[::-1])
        residents = self.idle - self.idle_pooled
        self._safe = self._queue.taken + self._queue.free_residents - residents

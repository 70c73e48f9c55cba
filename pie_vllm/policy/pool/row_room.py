"""Rows for KV that comes: free ones, or those of parked KV that is given up for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.watched_keys import WatchedKeys


class RowRoom:
    """Makes room among the rows by evicting parked KV, the least recently used first."""

    def __init__(
        self,
        rows: RowLedger,
        index: ParkedIndex[Hashable],
        copies: StepCopies,
        watched: WatchedKeys,
    ) -> None:
        """Over the books of parked KV.

        Args:
            rows: Ledger of the pool's rows.
            index: What is parked in them.
            copies: Of the coming step; what it was to store to an evicted row is not stored.
            watched: Told of keys that leave.
        """
        self._rows, self._index, self._copies, self._watched = rows, index, copies, watched

    def take(self, place: int | None) -> int | None:
        """A row to park in, that of a place if it can be had; None if none can be."""
        self.give_way(place)
        return self._rows.take_parked(place)

    def give_way(self, place: int | None) -> bool:
        """Evict parked KV where a place has no row; returns whether there is a row for it now."""
        rows = self._rows
        if place is not None and not rows.offers(place):
            self._evict_extent()
        if not rows.has_free and (evicted := self._index.evict()) is not None:
            key, row = evicted
            self._watched.changed(key)
            self._copies.free(row)
        return rows.has_free

    def _evict_extent(self) -> None:
        """Evict all of the extent of rows in which the least recently used parked block lies.

        Its neighbours were used with it, and a whole extent keeps those together that come next.
        No change where a row of the extent is not evictable: the extent would not become free.
        """
        oldest = self._index.oldest_row
        if oldest is None:
            return
        extents, keys = self._rows.extents, []
        for row in extents.members(oldest):
            if not extents.is_free(row):
                key = self._index.key_in(row)
                if key is None:
                    return
                keys.append(key)
        self.give_up(keys)

    def give_up(self, keys: Iterable[Hashable]) -> None:
        """Free the rows of these parked keys.

        Raises:
            IntegrityError: a key is not parked, or the coming step copies from its row.
        """
        for key in keys:
            self._watched.changed(key)
            self._copies.free(self._index.remove(key))

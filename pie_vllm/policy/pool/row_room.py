"""Rows for KV that comes: free ones, or those of parked KV that is given up for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from operator import is_not

from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.watched_keys import WatchedKeys

_IS_KEY: Callable[[Hashable], bool] = partial(is_not, None)


class RowRoom:
    """Makes room among the rows by evicting parked KV, the least recently used first.

    Attributes:
        wanted: Keys whose KV is not evicted for the sake of neighbouring rows.
        give_up_whole: Hook that gives up what is kept as a whole of a request, before other KV is
            evicted; says whether there was any.
    """

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
        self.wanted: Mapping[Hashable, int] = {}
        self.give_up_whole: Callable[[], bool] = lambda: False

    def take(self, place: int | None) -> int | None:
        """A row to park in, that of a place if it can be had; None if none can be."""
        self.give_way(place)
        return self._rows.take_parked(place)

    def take_spare(self, place: int | None) -> int | None:
        """``take``, but no other KV than that which ``give_up_whole`` gives up is evicted."""
        self._give_up_wholes()
        return self._rows.take_parked(place)

    def _give_up_wholes(self) -> None:
        """Give up what is kept as a whole of requests, until a row is free or nothing is left."""
        while not self._rows.has_free and self.give_up_whole():
            pass

    def take_first(self, places: list[int | None]) -> list[int]:
        """Rows to park the first blocks of such places in, as ``take`` finds them one by one.

        Returns:
            The rows of as many blocks as are alike: those whose places have rows, or those for
            which the same spare rows are left. It is empty if no row can be had.
        """
        rows, place = self._rows, places[0]
        if place is not None and rows.offers(place):
            return rows.take_parked_at(places)
        alike = rows.extents.alike(places)
        self.give_way(place, alike)
        if place is not None and rows.offers(place):
            return rows.take_parked_at(places)
        return rows.take_parked_spare(alike)

    def give_way(self, place: int | None, count: int = 1) -> bool:
        """Evict parked KV where a place has no row; returns whether there is a row for it now.

        Args:
            place: Of the block that a row is wanted for; None if it has none.
            count: Number of blocks that follow and want rows, too, itself included.
        """
        rows = self._rows
        if place is not None and not rows.offers(place):
            self._evict_extent()
        self._give_up_wholes()
        if not rows.has_free:
            self.give_up(self._index.oldest_keys(count))
        return rows.has_free

    def _evict_extent(self) -> None:
        """Evict all of the extent of rows in which the least recently used parked block lies.

        Its neighbours were used with it, and a whole extent keeps those together that come next.
        No change where a row of the extent is not evictable: the extent would not become free.
        """
        oldest = self._index.oldest_row
        if oldest is None:
            return
        extents = self._rows.extents
        keys = [*filter(_IS_KEY, map(self._index.key_in, extents.members(oldest)))]
        if len(keys) == extents.num_taken(oldest) and self.wanted.keys().isdisjoint(keys):
            self.give_up(keys)

    def give_up(self, keys: Iterable[Hashable]) -> None:
        """Free the rows of these parked keys.

        Raises:
            IntegrityError: a key is not parked, or the coming step copies from its row.
        """
        keys = [*dict.fromkeys(keys)]
        rows = self._index.remove_all(keys)
        self._watched.any_changed(keys)
        self._copies.free_all(rows)

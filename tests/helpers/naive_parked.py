"""The parked index written down as plainly as possible: lists, and a search for everything."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from pie_vllm.policy.pool.parked_index import ParkedIndex

K = TypeVar("K", bound=Hashable)


def evict(index: ParkedIndex[K]) -> tuple[K, int] | None:
    """Take out the key that is given up first; returns it with its row, None if there is none."""
    keys = index.oldest_keys(1)
    return (keys[0], index.remove(keys[0])) if keys else None


class NaiveIndex:
    """Keys, least recently used first; pinned ones stand in a list of their own."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.order: list[int] = []
        self.pinned: list[int] = []

    def park(self, key: int, row: int) -> None:
        self.rows[key] = row
        self.order.append(key)

    def touch(self, key: int) -> bool:
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)
        return key in self.rows

    def remove(self, key: int) -> int:
        self.order.remove(key)
        return self.rows.pop(key)

    def evict(self) -> tuple[int, int] | None:
        return (self.order[0], self.remove(self.order[0])) if self.order else None

    def pin(self, keys: list[int]) -> None:
        for key in keys:
            if key not in self.pinned:
                self.order.remove(key)
                self.pinned.append(key)

    def unpin_all(self) -> None:
        self.order += self.pinned
        self.pinned = []


class NaiveExtents(NaiveIndex):
    """The same by extents: the order is that of the last use of any row in each."""

    def __init__(self, capacity: int, size: int) -> None:
        super().__init__()
        self.capacity, self.size = capacity, size
        self.used: list[int] = []  # Extents, least recently used first.

    def _use(self, extent: int) -> None:
        if extent in self.used:
            self.used.remove(extent)
        self.used.append(extent)

    def _is_pinned(self, extent: int) -> bool:
        return extent in (self.rows[key] // self.size for key in self.pinned)

    def park(self, key: int, row: int) -> None:
        self.rows[key] = row
        if not self._is_pinned(row // self.size):
            self._use(row // self.size)

    def touch(self, key: int) -> bool:
        if key in self.rows and not self._is_pinned(self.rows[key] // self.size):
            self._use(self.rows[key] // self.size)
        return key in self.rows

    def remove(self, key: int) -> int:
        return self.rows.pop(key)

    def evict(self) -> tuple[int, int] | None:
        pinned = dict.fromkeys(self.rows[key] // self.size for key in self.pinned)
        others = [extent for extent in self.used if extent not in pinned]
        for extent in (*others, *pinned):
            rows = [
                (row, key)
                for key, row in self.rows.items()
                if row // self.size == extent and key not in self.pinned
            ]
            if rows:
                _, key = max(rows)
                return key, self.remove(key)
        return None

    def pin(self, keys: list[int]) -> None:
        self.pinned += [key for key in dict.fromkeys(keys) if key not in self.pinned]

    def unpin_all(self) -> None:
        for extent in dict.fromkeys(self.rows[key] // self.size for key in self.pinned):
            self._use(extent)
        self.pinned = []

"""The parked index written down as plainly as possible: lists, and a search for everything."""

from __future__ import annotations


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

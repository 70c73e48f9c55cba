"""Least recently used: the parked block that nobody wanted for longest goes first."""

from __future__ import annotations

from collections.abc import Hashable

from pie_vllm.policy.pool.eviction import Eviction


class Lru(Eviction):
    """One list, oldest first. A pass over more blocks than fit flushes it."""

    def __init__(self, capacity_rows: int) -> None:
        """Start without rows."""
        super().__init__(capacity_rows, 1)

    def park(self, row: int, key: Hashable) -> None:  # noqa: ARG002
        """See Eviction."""
        self.rows.append(0, row)

    def use(self, row: int) -> None:
        """See Eviction."""
        self.rows.remove(row)
        self.rows.append(0, row)

    def use_held(self, row: int) -> None:
        """See Eviction; a released row is the youngest anyway."""

    def take(self, row: int, key: Hashable) -> None:  # noqa: ARG002
        """See Eviction."""
        self.rows.remove(row)

    def choose(self) -> int:
        """See Eviction."""
        return self.rows.oldest(0)

    def evict(self, row: int, key: Hashable) -> None:  # noqa: ARG002
        """See Eviction."""
        self.rows.remove(row)

    def hold(self, row: int) -> None:
        """See Eviction."""
        self.rows.remove(row)

    def release(self, row: int) -> None:
        """See Eviction."""
        self.rows.append(0, row)

    def clear(self) -> None:
        """See Eviction."""
        while (row := self.rows.oldest(0)) >= 0:
            self.rows.remove(row)

"""Adaptive replacement: a single pass over much KV does not flush what is used again."""

from __future__ import annotations

from collections.abc import Hashable

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.chains import NO_CHAIN
from pie_vllm.policy.pool.eviction import Eviction
from pie_vllm.policy.pool.ghosts import Ghosts

ONCE, OFTEN = 0, 1
"""Lists of rows, and of ghosts of evicted ones: seen once lately, or more often."""
OUT = 2
"""A list of ghosts: taken after a hit, expected back."""


class Arc(Eviction):
    """ARC (Megiddo and Modha, FAST 2003), for blocks that leave when they are hit.

    Rows seen once stand in one list, those seen again in another; the ghosts of
    what was evicted from either say, when they return, that their list was too
    short, and move ``target``, the share of the first. What is taken is
    remembered as well: parked again, it has been seen again.

    Other than in the paper: the size of the cache is what is parked at the
    time, for the rows are shared with blocks in use and the pool breathes; the
    next block is not known at an eviction, so a tie goes against the second
    list; and ghosts are bounded together, so that a hot block is recognised
    after a pass longer than the cache.

    Attributes:
        target: rows that the list of those seen once should have.
    """

    def __init__(self, capacity_rows: int) -> None:
        """Start without rows; as many ghosts as rows are remembered at most."""
        super().__init__(capacity_rows, 2)
        self.ghosts = Ghosts(capacity_rows, 3)
        self.target = 0.0
        self._held_often: dict[int, bool] = {}

    def park(self, row: int, key: Hashable) -> None:
        """See Eviction."""
        once, often = self.ghosts.length(ONCE), self.ghosts.length(OFTEN)
        ghost = self.ghosts.recall(key)
        size = self.num_in_order + 1
        if ghost == ONCE:
            self.target = min(self.target + max(1.0, often / once), size)
        elif ghost == OFTEN:
            self.target = max(min(self.target, size) - max(1.0, once / often), 0.0)
        self.rows.append(OFTEN if ghost != NO_CHAIN else ONCE, row)

    def use(self, row: int) -> None:
        """See Eviction."""
        self.rows.remove(row)
        self.rows.append(OFTEN, row)

    def use_held(self, row: int) -> None:
        """See Eviction."""
        self._held_often[row] = True

    def take(self, row: int, key: Hashable) -> None:
        """See Eviction."""
        self.rows.remove(row)
        self.ghosts.remember(OUT, key)

    def choose(self) -> int:
        """See Eviction."""
        once = self.rows.length[ONCE]
        first = ONCE if once > self.target or not self.rows.length[OFTEN] else OFTEN
        return self.rows.oldest(first)

    def evict(self, row: int, key: Hashable) -> None:
        """See Eviction."""
        self.ghosts.remember(self.rows.remove(row), key)

    def hold(self, row: int) -> None:
        """See Eviction."""
        self._held_often[row] = self.rows.remove(row) == OFTEN

    def release(self, row: int) -> None:
        """See Eviction."""
        self.rows.append(OFTEN if self._held_often.pop(row) else ONCE, row)

    def clear(self) -> None:
        """See Eviction."""
        for chain in (ONCE, OFTEN):
            while (row := self.rows.oldest(chain)) >= 0:
                self.rows.remove(row)
        self._held_often.clear()
        self.ghosts.clear()
        self.target = 0.0

    def check_integrity(self) -> None:
        """See Eviction."""
        super().check_integrity()
        self.ghosts.check_integrity()
        if any(self.in_order(row) for row in self._held_often):
            raise IntegrityError("a held row may be chosen")

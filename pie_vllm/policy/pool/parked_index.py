"""Which row of the CPU pool holds the KV of which block hash, with no request using it."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable
from itertools import chain
from typing import Generic, TypeVar

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.eviction import LeastRecentlyUsed

K = TypeVar("K", bound=Hashable)


class ParkedIndex(Generic[K]):
    """The parked KV by key, one row each.

    It owns no bytes and hands out no rows: who parks says where the KV is, and who takes or evicts
    has the row to give back. A key is in the order of eviction, or it is pinned: then it stays
    until ``unpin_all``. ``keys_in``, ``clear`` and ``check_integrity`` pass over all that is
    parked; what other calls cost does not depend on it (see ``LeastRecentlyUsed``).

    Attributes:
        evictable_row: As ``row_of``, but gives None for a key that is pinned.
        pinned_row: As ``row_of``, but gives None for a key that is not pinned.
    """

    def __init__(self, capacity_rows: int) -> None:
        """Start empty; rows are 0 up to ``capacity_rows``."""
        self.capacity_rows = capacity_rows
        self._order: LeastRecentlyUsed[K] = LeastRecentlyUsed()
        self._pinned: dict[K, int] = {}
        self.evictable_row, self.pinned_row = self._order.row_of, self._pinned.get

    def __len__(self) -> int:
        """Number of parked blocks."""
        return len(self._order) + len(self._pinned)

    def __contains__(self, key: K) -> bool:
        """Whether the KV of a key is parked."""
        return self.row_of(key) is not None

    def row_of(self, key: K) -> int | None:
        """The row that holds the KV of a key; changes nothing."""
        row = self._order.row_of(key)
        return self._pinned.get(key) if row is None and self._pinned else row

    @property
    def oldest_row(self) -> int | None:
        """The row of the least recently used key, which ``evict`` gives; None without one."""
        return self._order.oldest_row

    @property
    def num_pinned(self) -> int:
        """Number of parked blocks that ``evict`` cannot give."""
        return len(self._pinned)

    def park(self, key: K, row: int) -> None:
        """A row that holds no parked KV holds that of ``key`` from now on.

        Raises:
            IntegrityError: the key is parked already, or the row is none of the pool's.
        """
        if not 0 <= row < self.capacity_rows:
            raise IntegrityError(f"row {row} is none of {self.capacity_rows}")
        if key in self:
            raise IntegrityError(f"the KV of {key!r} is parked already")
        self._order.add(key, row)

    def touch(self, key: K) -> bool:
        """Make a parked key the one used last, a pinned one at its unpinning; False if unknown."""
        return self._order.use(key) or key in self._pinned

    def touch_all(self, keys: Iterable[K]) -> None:
        """As ``touch`` for each of these keys."""
        self._order.use_all(keys)

    def remove(self, key: K) -> int:
        """A key leaves, because its row gets another use or its KV is wrong; returns the row.

        Raises:
            IntegrityError: the key is not parked, or it is pinned.
        """
        row = self._order.remove(key)
        if row is None:
            raise IntegrityError(f"the KV of {key!r} is {self._state(key)}")
        return row

    def evict(self) -> tuple[K, int] | None:
        """The least recently used key leaves, with its row; None where all are pinned."""
        return self._order.evict()

    def pin(self, keys: Iterable[K]) -> None:
        """Keep these keys until ``unpin_all``; a key that is pinned already stays so.

        Raises:
            IntegrityError: a key is not parked; those before it are pinned then.
        """
        remove, pinned = self._order.remove, self._pinned
        for key in keys:
            row = remove(key)
            if row is not None:
                pinned[key] = row
            elif key not in pinned:
                raise IntegrityError(f"the KV of {key!r} is {self._state(key)}")

    def unpin_all(self) -> None:
        """Pinned keys may be evicted again, as those used last, in the order of their pinning."""
        for key, row in self._pinned.items():
            self._order.add(key, row)
        self._pinned.clear()

    def rows(self) -> list[int]:
        """All rows that hold parked KV."""
        return [*self._pinned.values(), *(row for _, row in self._order.items())]

    def keys_in(self, rows: Container[int]) -> list[K]:
        """The keys whose KV is in these rows."""
        entries = chain(self._order.items(), self._pinned.items())
        return [key for key, row in entries if row in rows]

    def clear(self) -> list[int]:
        """Forget all; returns the rows.

        Raises:
            IntegrityError: a key is pinned; nothing is changed then.
        """
        if self._pinned:
            raise IntegrityError("a pinned key cannot be forgotten")
        rows = self.rows()
        self._order.clear()
        return rows

    def _state(self, key: K) -> str:
        return "pinned: a copy counts on its row" if key in self._pinned else "not parked"

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each key is here once, with a row of its own."""
        rows = self.rows()
        if len(set(rows)) != len(rows) or not all(0 <= r < self.capacity_rows for r in rows):
            raise IntegrityError("two parked keys share a row, or a row is none of the pool's")
        if any(self._order.row_of(key) is not None for key in self._pinned):
            raise IntegrityError("a pinned key may be evicted")

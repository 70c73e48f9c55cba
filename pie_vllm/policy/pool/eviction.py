"""Which parked block goes first: the one that nobody has used for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, ItemsView, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

POLICIES = ("lru",)
"""Names of the policies of eviction that a user may choose from."""


class LeastRecentlyUsed(Generic[K]):
    """Keys with the row of each, least recently used first.

    A call costs constant time, whatever is parked, except for one addition in about as many as
    there are keys: it lays the hash table out anew, which takes 0.2 to 0.4 us for each key. About
    120 bytes for each entry; the key comes on top.

    Attributes:
        row_of: Gives the row of a key, or None; changes nothing.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._rows: OrderedDict[K, int] = OrderedDict()
        self.row_of: Callable[[K], int | None] = self._rows.get  # It is asked for every key.

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._rows)

    @property
    def oldest_row(self) -> int | None:
        """The row of the least recently used key; None without keys."""
        return next(iter(self._rows.values()), None)

    def items(self) -> ItemsView[K, int]:
        """All keys with their rows, least recently used first."""
        return self._rows.items()

    def add(self, key: K, row: int) -> None:
        """Put in a key that is not here, as the one used last."""
        self._rows[key] = row

    def use(self, key: K) -> bool:
        """Make a key the one used last; False where it is not here."""
        if key not in self._rows:
            return False
        self._rows.move_to_end(key)
        return True

    def use_all(self, keys: Iterable[K]) -> None:
        """Make these keys the ones used last, in this order; no change for those not here."""
        rows, move = self._rows, self._rows.move_to_end
        for key in keys:
            if key in rows:
                move(key)

    def remove(self, key: K) -> int | None:
        """Take out a key; returns its row, or None where it is not here."""
        return self._rows.pop(key, None)

    def evict(self) -> tuple[K, int] | None:
        """Take out the least recently used key, with its row; None where there is none."""
        return self._rows.popitem(last=False) if self._rows else None

    def clear(self) -> None:
        """Take out all."""
        self._rows.clear()

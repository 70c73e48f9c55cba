"""Which row of the CPU pool holds the KV of which block hash, with no request using it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from itertools import takewhile
from operator import countOf
from typing import Generic, TypeVar

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.eviction import LeastRecentlyUsed

K = TypeVar("K", bound=Hashable)


class ParkedIndex(Generic[K]):
    """The parked KV by key, one row each.

    It owns no bytes and hands out no rows: who parks says where the KV is, and who takes or evicts
    has the row to give back. Rows are used, pinned and evicted by their extents
    (``pie_vllm.policy.pool.extents``): what lies in one was parked and is used together, so a
    context of thousands of blocks is some hundred of them. With extents of one row the order is
    that of the keys. A key that is pinned stays until ``unpin_all``; what is parked in its extent
    is evicted after all else until then. ``keys_in``, ``clear`` and ``check_integrity`` pass over
    all that is parked; what other calls cost does not depend on it.

    Attributes:
        row_of: Gives the row that holds the KV of a key, or None; changes nothing.
        pinned_rows: Rows of the pinned keys; read only.
    """

    def __init__(self, capacity_rows: int, extent_rows: int = 1) -> None:
        """Start empty.

        Args:
            capacity_rows: Number of rows, which are 0 up to it.
            extent_rows: Number of rows of an extent, a power of two.
        """
        self.capacity_rows = capacity_rows
        self.pinned_rows: set[int] = set()
        self._rows: dict[K, int] = {}
        self._keys: list[K | None] = [None] * capacity_rows
        self._size = extent_rows
        self._shift = extent_rows.bit_length() - 1
        self._parked_in = [0] * -(-capacity_rows // extent_rows)  # Number of rows, by extent.
        # Extents with parked rows: those of pinned ones, in the order of their pinning, and others.
        self._pinned: dict[int, None] = {}
        self._order = LeastRecentlyUsed()
        self.row_of: Callable[[K], int | None] = self._rows.get  # It is called for every key.

    def __len__(self) -> int:
        """Number of parked blocks."""
        return len(self._rows)

    def __contains__(self, key: K) -> bool:
        """Whether the KV of a key is parked."""
        return key in self._rows

    def any_of(self, keys: Iterable[K | None]) -> bool:
        """Whether the KV of any of these keys is parked; None is no key."""
        return not self._rows.keys().isdisjoint(keys)

    def key_in(self, row: int) -> K | None:
        """The key whose KV is parked in a row; None if it holds none."""
        return self._keys[row]

    @property
    def oldest_row(self) -> int | None:
        """A row of the least recently used extent without a pinned key; None without one."""
        oldest = self._order.oldest
        return None if oldest is None else oldest << self._shift

    @property
    def num_pinned(self) -> int:
        """Number of parked blocks that ``evict`` cannot give."""
        return len(self.pinned_rows)

    def park(self, key: K, row: int, *, pinned: bool = False) -> None:
        """A row that holds no parked KV holds that of ``key`` from now on; ``pinned`` as ``pin``.

        Raises:
            IntegrityError: the key is parked already, or the row is none of the pool's.
        """
        if not 0 <= row < self.capacity_rows:
            raise IntegrityError(f"row {row} is none of {self.capacity_rows}")
        if key in self._rows:
            raise IntegrityError(f"the KV of {key!r} is parked already")
        self._rows[key], self._keys[row] = row, key
        extent = row >> self._shift
        self._parked_in[extent] += 1
        if pinned:
            self.pinned_rows.add(row)
            self._pin_extent(extent)
        elif extent not in self._pinned:
            self._order.use(extent)

    def lacking(self, keys: Iterable[K]) -> list[K]:
        """The first of these keys, up to one that is parked or the same as one before."""
        keys = [*keys]
        found = dict.fromkeys(keys)
        if len(found) == len(keys) and not self.any_of(keys):  # Mostly none is parked.
            return keys
        found = {}
        for key in keys:
            if key in self._rows or key in found:
                break
            found[key] = None
        return [*found]

    def park_all(self, keys: Sequence[K], rows: Sequence[int]) -> None:
        """``park`` for each of these keys, which are ``lacking``.

        Raises:
            IntegrityError: a row is none of the pool's; nothing is changed then.
        """
        if not (min(rows) >= 0 and max(rows) < self.capacity_rows):
            raise IntegrityError(f"a row is none of {self.capacity_rows}")
        self._rows.update(zip(keys, rows, strict=True))
        at, parked_in, shift = self._keys, self._parked_in, self._shift
        for key, row in zip(keys, rows, strict=True):
            at[row] = key
            parked_in[row >> shift] += 1
        for extent in self._extents_of(rows):
            if extent not in self._pinned:
                self._order.use(extent)

    def touch(self, key: K) -> bool:
        """Make a parked key the one used last, a pinned one at its unpinning; False if unknown."""
        row = self._rows.get(key)
        if row is None:
            return False
        self._order.use_again(row >> self._shift)
        return True

    def touch_first(self, keys: Iterable[K]) -> int:
        """``touch`` the first of these keys, up to one that is not parked.

        Returns:
            How many they are.
        """
        found = [*takewhile(self._rows.__contains__, keys)]
        for extent in self._extents_of([*map(self._rows.__getitem__, found)]):
            self._order.use_again(extent)
        return len(found)

    def touch_run(self, keys: Sequence[K]) -> None:
        """As ``touch`` for each of these keys, which follow each other in a chain.

        One in half an extent stands for those around it: where keys have the rows of their places,
        they fill extents.
        """
        for key in (*keys[:: max(self._size // 2, 1)], *keys[-1:]):
            self.touch(key)

    def remove(self, key: K) -> int:
        """A key leaves, because its row gets another use or its KV is wrong; returns the row.

        Raises:
            IntegrityError: the key is not parked, or it is pinned.
        """
        return self.remove_all((key,))[0]

    def remove_all(self, keys: Sequence[K]) -> list[int]:
        """``remove`` for each of these keys, which differ; no change where it raises an error."""
        found = [*map(self._rows.get, keys)]
        rows = [row for row in found if row is not None]
        if len(rows) < len(found) or not self.pinned_rows.isdisjoint(rows):
            for key, row in zip(keys, found, strict=True):
                if row is None or row in self.pinned_rows:
                    state = "not parked" if row is None else "pinned: a copy counts on its row"
                    raise IntegrityError(f"the KV of {key!r} is {state}")
        deque(map(self._rows.__delitem__, keys), maxlen=0)
        at, parked_in, shift = self._keys, self._parked_in, self._shift
        for row in rows:
            at[row] = None
            parked_in[row >> shift] -= 1
        for extent in {row >> shift for row in rows}:
            if not parked_in[extent]:
                self._order.remove(extent)
        return rows

    def oldest_keys(self, count: int) -> list[K]:
        """Up to ``count`` keys to be given up first, of one extent; none where all are pinned.

        The last ones of the least recently used extent: those before them are of more use without
        them than they are without those.
        """
        oldest, keys = self._order.oldest, []
        for extent in self._pinned if oldest is None else (oldest,):
            first = extent << self._shift
            for row in reversed(range(first, min(first + self._size, self.capacity_rows))):
                key = self._keys[row]
                if key is not None and row not in self.pinned_rows:
                    keys.append(key)
                    if len(keys) == count:
                        return keys
            if keys:
                break
        return keys

    def pin(self, keys: Iterable[K]) -> list[int]:
        """Keep these keys until ``unpin_all``; a key that is pinned already stays so.

        Returns:
            The row of each.

        Raises:
            IntegrityError: a key is not parked; the others are pinned then.
        """
        keys = [*keys]
        found = [*map(self._rows.get, keys)]
        rows = [row for row in found if row is not None]
        self.pinned_rows.update(rows)
        shift = self._shift
        for extent in dict.fromkeys([row >> shift for row in rows]):
            self._pin_extent(extent)
        if len(rows) < len(keys):
            raise IntegrityError(f"the KV of {keys[found.index(None)]!r} is not parked")
        return rows

    def unpin_all(self) -> None:
        """Pinned keys may be evicted again, as those used last, in the order of their pinning."""
        if self._pinned:
            for extent in self._pinned:
                if self._parked_in[extent]:
                    self._order.use(extent)
            self._pinned.clear()
            self.pinned_rows.clear()

    def _pin_extent(self, extent: int) -> None:
        self._order.remove(extent)
        self._pinned[extent] = None

    def _extents_of(self, rows: Sequence[int]) -> Iterable[int]:
        """Extents of these rows, each once, in the order of its last row among them."""
        shift = self._shift
        return reversed(dict.fromkeys([row >> shift for row in reversed(rows)]))

    def rows(self) -> list[int]:
        """All rows that hold parked KV."""
        return [*self._rows.values()]

    def keys_in(self, rows: Container[int]) -> list[K]:
        """The keys whose KV is in these rows."""
        return [key for key, row in self._rows.items() if row in rows]

    def clear(self) -> list[int]:
        """Forget all; returns the rows.

        Raises:
            IntegrityError: a key is pinned; nothing is changed then.
        """
        if self._pinned:
            raise IntegrityError("a pinned key cannot be forgotten")
        rows = self.rows()
        self._rows.clear()
        self._keys = [None] * self.capacity_rows
        self._parked_in = [0] * len(self._parked_in)
        self._order.clear()
        return rows

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each key is here once, with a row of its own."""
        rows = self.rows()
        if len(set(rows)) != len(rows) or not all(0 <= r < self.capacity_rows for r in rows):
            raise IntegrityError("two parked keys share a row, or a row is none of the pool's")
        if any(self._keys[row] != key for key, row in self._rows.items()) or (
            countOf(map(type, self._keys), type(None)) != len(self._keys) - len(rows)
        ):
            raise IntegrityError("the keys of rows disagree with the rows of keys")
        parked_in = [0] * len(self._parked_in)
        for row in rows:
            parked_in[row >> self._shift] += 1
        if parked_in != self._parked_in:
            raise IntegrityError("the count of an extent's parked rows is off")
        evictable = {e for e, parked in enumerate(parked_in) if parked and e not in self._pinned}
        if len(self._order) != len(evictable) or not all(e in self._order for e in evictable):
            raise IntegrityError("a pinned extent may be evicted, or one that is parked may not")
        if not {row >> self._shift for row in self.pinned_rows} <= self._pinned.keys():
            raise IntegrityError("a pinned key may be evicted")

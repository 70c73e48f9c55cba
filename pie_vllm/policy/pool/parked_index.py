"""Which row of the CPU pool holds the KV of which block hash, with no request using it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from pie_vllm.errors import ConfigError, IntegrityError
from pie_vllm.policy.pool.arc import Arc
from pie_vllm.policy.pool.eviction import Eviction
from pie_vllm.policy.pool.key_table import KeyTable
from pie_vllm.policy.pool.lru import Lru

K = TypeVar("K", bound=Hashable)

POLICIES: dict[str, Callable[[int], Eviction]] = {"lru": Lru, "arc": Arc}
"""By the name that users give it: what decides which parked block goes first."""


class ParkedIndex(Generic[K]):
    """The parked KV by key, one row each.

    It owns no bytes and hands out no rows: who parks says where the KV is, and
    who takes or evicts has the row to give back. All but ``clear``,
    ``drop_rows_from`` and ``check_integrity`` cost constant time, and no call
    ever moves the whole index. Structures are made once for the capacity: 25
    bytes a row with LRU, 58 with ARC and as many ghosts; the key comes on top.
    """

    def __init__(self, capacity_rows: int, policy: str = "lru") -> None:
        """Start empty.

        Args:
            capacity_rows: of the pool; rows are 0 up to this.
            policy: a name of ``POLICIES``.

        Raises:
            ConfigError: there is no policy of that name.
        """
        if policy not in POLICIES:
            raise ConfigError(
                f"no eviction policy for parked KV is called {policy!r}; "
                f"choose one of {', '.join(sorted(POLICIES))}"
            )
        self.capacity_rows = capacity_rows
        self._keys: list[K | None] = [None] * capacity_rows
        self._table = KeyTable(capacity_rows, self._keys)
        self._order = POLICIES[policy](capacity_rows)
        self._pins: dict[int, int] = {}

    def __len__(self) -> int:
        """How many blocks are parked."""
        return len(self._table)

    def __contains__(self, key: K) -> bool:
        """Whether the KV of a key is parked."""
        return self._table.find(key) >= 0

    def row_of(self, key: K) -> int | None:
        """The row that holds the KV of a key; changes nothing."""
        row = self._table.find(key)
        return row if row >= 0 else None

    def rows(self) -> set[int]:
        """All rows that hold parked KV; costs a pass over the pool."""
        return {row for row, key in enumerate(self._keys) if key is not None}

    @property
    def evictable(self) -> int:
        """How many blocks ``evict`` can give one after the other: all that are not pinned."""
        return len(self._table) - len(self._pins)

    def park(self, key: K, row: int) -> None:
        """A row holds the KV of ``key`` from now on.

        Raises:
            IntegrityError: the key is parked already, the row holds parked KV
                already or is none of the pool's.
        """
        if not 0 <= row < self.capacity_rows:
            raise IntegrityError(f"row {row} is none of {self.capacity_rows}")
        if self._keys[row] is not None:
            raise IntegrityError(f"row {row} holds parked KV already")
        if self._table.find(key) >= 0:
            raise IntegrityError(f"the KV of {key!r} is parked already")
        self._table.add(key, row)
        self._order.park(row, key)

    def take(self, key: K) -> int:
        """A hit whose row leaves the index; returns the row.

        Raises:
            IntegrityError: the key is not parked, or it is pinned; unpin it first.
        """
        row = self._find(key)
        if row in self._pins:
            raise IntegrityError(f"row {row} is pinned: somebody else counts on it")
        self._order.take(row, key)
        self._remove(row)
        return row

    def touch(self, key: K) -> None:
        """A hit whose row stays; a pinned one counts as used once it is unpinned.

        Raises:
            IntegrityError: the key is not parked.
        """
        row = self._find(key)
        if row in self._pins:
            self._order.use_held(row)
        else:
            self._order.use(row)

    def evict(self) -> tuple[K, int] | None:
        """The entry worth least leaves: its key and its row; None when all are pinned."""
        row = self._order.choose()
        if row < 0:
            return None
        key = self._keys[row]
        assert key is not None
        self._order.evict(row, key)
        self._remove(row)
        return key, row

    def pin(self, key: K) -> None:
        """Keep an entry until as many calls of ``unpin``; see ``drop_rows_from`` and ``clear``.

        Raises:
            IntegrityError: the key is not parked.
        """
        row = self._find(key)
        pins = self._pins.get(row, 0)
        if not pins:
            self._order.hold(row)
        self._pins[row] = pins + 1

    def unpin(self, key: K) -> None:
        """Take one pin off. The last one off leaves the entry as young as one just used.

        Raises:
            IntegrityError: the key is not parked or not pinned.
        """
        row = self._find(key)
        pins = self._pins.get(row, 0)
        if not pins:
            raise IntegrityError(f"row {row} is not pinned")
        if pins > 1:
            self._pins[row] = pins - 1
            return
        del self._pins[row]
        self._order.release(row)

    def drop(self, key: K) -> int:
        """Forget an entry, whose KV is wrong; returns the row.

        Raises:
            IntegrityError: the key is not parked, or it is pinned.
        """
        row = self._find(key)
        if row in self._pins:
            raise IntegrityError(f"row {row} is pinned: somebody else counts on it")
        self._order.drop(row)
        self._remove(row)
        return row

    def key_of(self, row: int) -> K | None:
        """The key whose KV a row holds, if it is parked."""
        return self._keys[row]

    def drop_rows_from(self, row: int) -> list[int]:
        """Forget all entries whose row is ``row`` or above; returns their rows.

        Costs a pass over those rows.

        Raises:
            IntegrityError: one of them is pinned; nothing is changed then.
        """
        if any(pinned >= row for pinned in self._pins):
            raise IntegrityError(f"a row from {row} on is pinned: it cannot be dropped now")
        dropped = [r for r in range(row, self.capacity_rows) if self._keys[r] is not None]
        for r in dropped:
            self._order.drop(r)
            self._remove(r)
        return dropped

    def clear(self) -> list[int]:
        """Forget all, what was seen before too; returns the rows.

        Raises:
            IntegrityError: an entry is pinned; nothing is changed then.
        """
        dropped = self.drop_rows_from(0)
        self._order.clear()
        return dropped

    def _find(self, key: K) -> int:
        row = self._table.find(key)
        if row < 0:
            raise IntegrityError(f"the KV of {key!r} is not parked")
        return row

    def _remove(self, row: int) -> None:
        self._table.remove(row)
        self._keys[row] = None

    def check_integrity(self) -> None:
        """Raise IntegrityError unless keys, rows and order agree; costs a pass over all rows."""
        self._table.check_integrity()
        self._order.check_integrity()
        held = [row for row, key in enumerate(self._keys) if key is not None]
        if len(held) != len(self._table) or any(
            self._table.find(self._keys[row]) != row for row in held
        ):
            raise IntegrityError("keys and table disagree")
        in_order = sum(self._order.in_order(row) for row in held)
        if in_order != self._order.num_in_order or in_order + len(self._pins) != len(held):
            raise IntegrityError("parked rows and the order of eviction disagree")
        if any(pins < 1 or self._order.in_order(row) for row, pins in self._pins.items()):
            raise IntegrityError("a pinned row may be chosen")

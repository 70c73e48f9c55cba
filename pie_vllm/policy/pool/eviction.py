"""Which parked KV goes first: what nobody has used for longest."""

from __future__ import annotations

from collections import OrderedDict

POLICIES = ("lru",)
"""Names of the policies of eviction that a user may choose from."""


class LeastRecentlyUsed:
    """Extents of rows by number, least recently used first.

    A call costs constant time, except for one use in about as many as there are extents: it lays
    the hash table out anew.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._order: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Number of extents."""
        return len(self._order)

    def __contains__(self, extent: int) -> bool:
        """Whether an extent is here."""
        return extent in self._order

    @property
    def oldest(self) -> int | None:
        """The least recently used extent; None without one."""
        return next(iter(self._order), None)

    def use(self, extent: int) -> None:
        """Make an extent the one used last, whether it is here or not."""
        self._order[extent] = None
        self._order.move_to_end(extent)

    def use_again(self, extent: int) -> None:
        """Make an extent that is here the one used last; no change for another one."""
        if extent in self._order:
            self._order.move_to_end(extent)

    def remove(self, extent: int) -> None:
        """Take out an extent; no change where it is not here."""
        self._order.pop(extent, None)

    def clear(self) -> None:
        """Take out all."""
        self._order.clear()

"""Keys that a remembered look-up counts on, so that it hears of the first one that changes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import count


class WatchedKeys:
    """Keys of a request's blocks, in the order of its table.

    Whoever moves cached or parked KV says so here, which costs a look into a dict where keys are
    watched and less where none are. What is told of other keys changes nothing.

    Attributes:
        places: Place of each key in the request's table; read only.
        first_changed: Place of the first key that changed since the last ``cut``; None if none did.
    """

    def __init__(self) -> None:
        """Watch nothing."""
        self.places: dict[Hashable, int] = {}
        self.first_changed: int | None = None

    def add(self, keys: Iterable[Hashable]) -> None:
        """Watch these keys, too, as the next of the table."""
        self.places.update(zip(keys, count(len(self.places))))

    def changed(self, key: Hashable) -> None:
        """The KV of a key has another place, or none."""
        place = self.places.get(key)
        if place is not None and (self.first_changed is None or place < self.first_changed):
            self.first_changed = place

    def any_changed(self, keys: Iterable[Hashable]) -> None:
        """``changed`` for each of these keys."""
        if self.places:
            for key in filter(self.places.__contains__, keys):
                self.changed(key)

    def all_changed(self) -> None:
        """Nothing is where it was."""
        if self.places:
            self.first_changed = 0

    def cut(self) -> list[Hashable]:
        """Stop watching the keys from the first changed one on; returns them."""
        if self.first_changed is None:
            return []
        keys = [*self.places][self.first_changed :]
        for key in keys:
            del self.places[key]
        self.first_changed = None
        return keys

    def clear(self) -> None:
        """Watch nothing any more."""
        self.places.clear()
        self.first_changed = None

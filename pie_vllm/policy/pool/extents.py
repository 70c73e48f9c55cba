"""Slots handed out by aligned extents, so that what belongs together lies together for long.

A *place* says where a block belongs: ``chain * CHAIN + index``, with a number for the chain of
blocks that follow each other (a request, its turns before) and the block's index in it. Places are
mapped to slots as a page table maps addresses: an extent of places, aligned, to an extent of slots,
so that neighbours stay neighbours whoever was there before, in whatever order they come and go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import takewhile

from pie_vllm.errors import IntegrityError
from pie_vllm.geometry import EXTENT_BLOCKS

CHAIN = 1 << 24
"""Places of one chain: a bound on the blocks of a request. A multiple of every extent."""

EXTENTS_MIN = 256
"""Minimum number of extents of a space that is divided in any: half an extent is lost to the end of
each chain, which is KV that a small pool could hold."""


def extent_of(slots: int) -> int:
    """Slots of an extent in a space of ``slots``: a power of two."""
    return 1 << max(0, min(EXTENT_BLOCKS, slots // EXTENTS_MIN).bit_length() - 1)


class Extents:
    """Which slots of a space are taken, and which extent is for which places.

    Where an extent is found for a place, the place has the slot at its own offset. Extents that are
    wholly free are given to new places, the lowest first, but one next to the extent of the
    neighbouring places before all others. What is left over in the extents of others is ``spare``.
    A call costs constant time on average, or the logarithm of the number of extents.

    Attributes:
        size: Number of slots of an extent.
        num_free: Number of free slots that may be handed out.
    """

    def __init__(self, slots: int, size: int) -> None:
        """Start with all of so many slots free, in extents of ``size``."""
        count = -(-slots // size)
        self.size = size
        self.num_free = slots
        self._usable = slots
        self._taken = bytearray(slots)
        self._used = [0] * count
        self._places: list[int | None] = [None] * count  # Divided by the size, as the keys here:
        self._extents: dict[int, int] = {}
        self._empty = list(range(count))  # Wholly free, and some that are not any more.
        self._partial: list[int] = []  # With a free slot, and some without one.
        self._listed_empty = bytearray(b"\1") * count
        self._listed_partial = bytearray(count)

    @property
    def usable(self) -> int:
        """Slots from here on are not handed out; none of them is taken."""
        return self._usable

    @usable.setter
    def usable(self, slots: int) -> None:
        self._usable = slots
        self.num_free = self._taken.count(0, 0, slots)

    def is_free(self, slot: int) -> bool:
        """Whether a slot is not taken."""
        return not self._taken[slot]

    def places_of(self, slots: Iterable[int]) -> list[int]:
        """The place that each slot was meant for when it was taken; the slot's own if spare."""
        size, places = self.size, self._places
        return [
            slot if (place := places[slot // size]) is None else place * size + slot % size
            for slot in slots
        ]

    def members(self, slot: int) -> range:
        """The slots of the extent of a slot."""
        first = slot - slot % self.size
        return range(first, min(first + self.size, len(self._taken)))

    def num_taken(self, slot: int) -> int:
        """Number of taken slots in the extent of a slot."""
        return self._used[slot // self.size]

    def offers(self, place: int) -> bool:
        """Whether ``take`` would return a slot."""
        key, offset = divmod(place, self.size)
        extent = self._extents.get(key)
        if extent is not None:
            slot = extent * self.size + offset
            if slot < self._usable and not self._taken[slot]:
                return True
        return self._fresh(key) is not None

    def take(self, place: int) -> int | None:
        """Take the slot of a place, or one in an extent that is wholly free; None without either.

        The extent is for the places around this one from now on.
        """
        key, offset = divmod(place, self.size)
        extent = self._extents.get(key)
        if extent is not None:
            slot = extent * self.size + offset
            if slot < self._usable and not self._taken[slot]:
                return self._mark(slot)
        extent = self._fresh(key)
        if extent is None:
            return None
        self._extents[key], self._places[extent] = extent, key
        return self._mark(extent * self.size + offset)

    def take_runs(self, places: list[int | None]) -> list[range]:
        """``take`` for each of these places, up to the first one that is None or has no slot.

        Places that follow each other, up or down, are taken together as far as their extent goes.

        Returns:
            The slots in the order of the places, each run of them as a range.
        """
        size, runs, done = self.size, [], 0
        while done < len(places):
            place = places[done]
            slot = None if place is None else self.take(place)
            if place is None or slot is None:
                break
            offset = place % size
            up = self._take_beside(slot, places[done : done + size - offset], 1)
            down = 1 if up > 1 else self._take_beside(slot, places[done : done + offset + 1], -1)
            runs.append(range(slot, slot + up) if up > 1 else range(slot, slot - down, -1))
            done += max(up, down)
        return runs

    def _take_beside(self, slot: int, places: list[int | None], step: int) -> int:
        """Take the slots after or before one for the places that follow on its place, or none.

        Args:
            slot: The slot of the first place, in the extent that is for all of them.
            places: The first place and those after it.
            step: 1 for places that rise by one, -1 for places that fall.

        Returns:
            Number of places that have slots now, the first among them.
        """
        place, count = places[0], len(places)
        assert place is not None
        if count < 2 or places != [*range(place, place + count * step, step)]:
            return 1
        first, end = (slot + 1, slot + count) if step > 0 else (slot - count + 1, slot)
        if end > self._usable or self._taken.find(1, first, end) >= 0:
            return 1
        self._taken[first:end] = b"\1" * (count - 1)
        self._used[slot // self.size] += count - 1
        self.num_free -= count - 1
        return count

    def alike(self, places: list[int | None]) -> int:
        """How many of the first places have no slot for the same reason as the first one has none.

        They are those without a place, or those of an extent of places that has no slots.
        """
        size, first = self.size, places[0]
        if first is None:
            return len([*takewhile(lambda place: place is None, places)])
        key = first // size
        if key in self._extents:
            return 1
        near = range(key * size, key * size + size)
        return len([*takewhile(near.__contains__, places)])

    def take_spares(self, count: int) -> list[int]:
        """``take_spare`` so many times, as far as there are free slots."""
        slots: list[int] = []
        while len(slots) < count and (slot := self.take_spare()) is not None:
            slots.append(slot)
            end = min(slot - slot % self.size + self.size, self._usable)
            while len(slots) < count and (slot := self._taken.find(0, slot + 1, end)) >= 0:
                slots.append(self._mark(slot))
        return slots

    def take_spare(self) -> int | None:
        """Take any free slot, one in an extent that is in use before others; None if all are."""
        partial = self._partial
        while partial:
            extent = partial[0]
            first = extent * self.size
            end = min(first + self.size, self._usable)
            slot = self._taken.find(0, first, end) if end > first else -1
            if slot >= 0:
                return self._mark(slot)
            if end < first + self.size and end < len(self._taken):
                break  # Those behind it may not be used either.
            heappop(partial)
            self._listed_partial[extent] = 0
        slot = self._taken.find(0, 0, self._usable) if self.num_free else -1
        return self._mark(slot) if slot >= 0 else None

    def give(self, slot: int) -> None:
        """A taken slot is free."""
        self._taken[slot] = 0
        self._given(slot // self.size, 1)

    def give_all(self, slots: Sequence[int]) -> None:
        """``give`` for each of these slots."""
        taken, size = self._taken, self.size
        for slot in slots:
            taken[slot] = 0
        for extent, count in Counter([slot // size for slot in slots]).items():
            self._given(extent, count)

    def _given(self, extent: int, count: int) -> None:
        """So many slots of an extent are free that were not."""
        self.num_free += count
        self._used[extent] -= count
        if self._used[extent]:
            if not self._listed_partial[extent]:
                self._listed_partial[extent] = 1
                heappush(self._partial, extent)
            return
        key, self._places[extent] = self._places[extent], None
        if key is not None and self._extents.get(key) == extent:
            del self._extents[key]
        if not self._listed_empty[extent]:
            self._listed_empty[extent] = 1
            heappush(self._empty, extent)

    def _mark(self, slot: int) -> int:
        self._taken[slot] = 1
        self.num_free -= 1
        extent = slot // self.size
        if not self._used[extent] and not self._listed_partial[extent] and self.size > 1:
            self._listed_partial[extent] = 1
            heappush(self._partial, extent)
        self._used[extent] += 1
        return slot

    def _fresh(self, key: int) -> int | None:
        """A wholly free extent, next to that of the neighbouring places if there is such a one."""
        extents, used = self._extents, self._used
        whole = self._usable // self.size
        before, after = extents.get(key - 1), extents.get(key + 1)
        if before is not None and before + 1 < whole and not used[before + 1]:
            return before + 1
        if after is not None and 0 < after <= whole and not used[after - 1]:
            return after - 1
        empty = self._empty
        while empty and used[empty[0]]:
            self._listed_empty[heappop(empty)] = 0
        return empty[0] if empty and empty[0] < whole else None

    def free_slots(self) -> list[int]:
        """All free slots, those that may not be used too; costs a pass over the slots."""
        return [slot for slot, taken in enumerate(self._taken) if not taken]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless counts and lists agree; costs a pass over the slots."""
        taken = [sum(self._taken[m] for m in self.members(e * self.size)) for e in self._numbers]
        if taken != self._used:
            raise IntegrityError("the count of taken slots of an extent is off")
        if self.num_free != self._taken.count(0, 0, self._usable):
            raise IntegrityError("the count of free slots is off")
        if any(not taken[e] and e not in self._empty for e in self._numbers):
            raise IntegrityError("an extent that is free is not listed")
        partial = (e for e in self._numbers if 0 < taken[e] < len(self.members(e * self.size)))
        if not set(self._partial).issuperset(partial):
            raise IntegrityError("an extent with spare slots is not listed")
        if any(self._places[extent] != key for key, extent in self._extents.items()):
            raise IntegrityError("an extent is for other places than it says")

    @property
    def _numbers(self) -> range:
        return range(len(self._used))

"""Pooled ids that hold no KV, handed out so that neighbours of a request have neighbouring ids."""

from __future__ import annotations

import re

from pie_vllm.errors import IntegrityError

_FREE = re.compile(b"\0+")


class BlankIds:
    """Which of the window's slots are blank. Slots are pooled ids, counted from 0.

    A place (``pie_vllm.policy.pool.extents``) gets the slot next to that of its neighbour in the
    chain; where that is taken, the first one of the longest gap, so that those which follow have
    room behind it. A gap is found by a pass over the window, once for all blocks that it takes.
    """

    def __init__(self, slots: int) -> None:
        """Start with all of so many slots blank."""
        self.num_free = slots
        self._taken = bytearray(slots)
        self._places: list[int] = [0] * slots
        self._slots: dict[int, int] = {}

    def is_free(self, slot: int) -> bool:
        """Whether a slot is blank."""
        return not self._taken[slot]

    def beside(self, place: int) -> int | None:
        """The blank slot next to that of a place's neighbour; None if there is none."""
        slots, taken = self._slots, self._taken
        before = slots.get(place - 1)
        if before is not None and before + 1 < len(taken) and not taken[before + 1]:
            return before + 1
        after = slots.get(place + 1)
        return after - 1 if after and not taken[after - 1] else None

    def longest_gap(self) -> tuple[int, int]:
        """First slot and length of the longest stretch of blank slots; length 0 without one."""
        best = first = 0
        for gap in _FREE.finditer(self._taken):
            start, end = gap.span()
            if end - start > best:
                best, first = end - start, start
        return first, best

    def take(self, slot: int, place: int) -> None:
        """A blank slot is for a place from now on."""
        self._taken[slot] = 1
        self.num_free -= 1
        self._places[slot] = place
        self._slots[place] = slot

    def give(self, slot: int) -> None:
        """A taken slot is blank."""
        self._taken[slot] = 0
        self.num_free += 1
        place = self._places[slot]
        if self._slots.get(place) == slot:
            del self._slots[place]

    def free_slots(self) -> list[int]:
        """All blank slots, in order."""
        return [slot for slot, taken in enumerate(self._taken) if not taken]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the count is right and places name taken slots."""
        if self.num_free != self._taken.count(0):
            raise IntegrityError("the count of blank ids is off")
        for place, slot in self._slots.items():
            if self._places[slot] != place or not self._taken[slot]:
                raise IntegrityError("a place names an id that it has not")

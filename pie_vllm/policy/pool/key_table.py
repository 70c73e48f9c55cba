"""A hash table from keys to small numbers that costs eight bytes a number."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, MutableSequence
from typing import Any

from pie_vllm.errors import IntegrityError


class KeyTable:
    """Finds the number, below ``count``, that stands under a key.

    In place of a dict for three reasons: a dict keeps an object for each
    number and spare room, 60 to 90 bytes an entry; it grows by moving all its
    entries, a pause of tens of milliseconds at a million; and ghosts have no
    key objects. Linear probing at most half full, entries moved up at a
    removal: no marks of removed entries, so age does not slow it down.

    Costs constant time on average as long as the keys' hashes differ in what is
    left of them modulo ``2 * count + 1``; hashes of bytes and of integers do.
    """

    def __init__(self, count: int, keys: MutableSequence[Any]) -> None:
        """Start empty; ``keys`` has an entry per number, which the table sets."""
        self.keys = keys
        self._size = 2 * count + 1
        self._slots = array("i", [-1]) * self._size
        self._held = 0

    def __len__(self) -> int:
        """How many numbers stand under a key."""
        return self._held

    def find(self, key: Hashable) -> int:
        """The number under a key; -1 when there is none."""
        slots, keys, size = self._slots, self.keys, self._size
        slot = hash(key) % size
        while (number := slots[slot]) >= 0:
            if keys[number] == key:
                return number
            slot += 1
            if slot == size:
                slot = 0
        return -1

    def add(self, key: Hashable, number: int) -> None:
        """Put a number that is not there under a key that is not there."""
        slots, size = self._slots, self._size
        slot = hash(key) % size
        while slots[slot] >= 0:
            slot += 1
            if slot == size:
                slot = 0
        slots[slot] = number
        self.keys[number] = key
        self._held += 1

    def remove(self, number: int) -> None:
        """Take out a number that is there; its entry of ``keys`` is left as it is."""
        slots, keys, size = self._slots, self.keys, self._size
        slot = hash(keys[number]) % size
        while slots[slot] != number:
            slot += 1
            if slot == size:
                slot = 0
        hole = slot
        while True:
            slot += 1
            if slot == size:
                slot = 0
            other = slots[slot]
            if other < 0:
                break
            # It may move up to the hole unless its search starts after it.
            if (slot - hash(keys[other])) % size >= (slot - hole) % size:
                slots[hole] = other
                hole = slot
        slots[hole] = -1
        self._held -= 1

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each number is found under its key, once."""
        numbers = [number for number in self._slots if number >= 0]
        if len(set(numbers)) != len(numbers) or len(numbers) != self._held:
            raise IntegrityError("a number stands in the table twice, or the count is wrong")
        for number in numbers:
            if self.find(self.keys[number]) != number:
                raise IntegrityError(f"number {number} is not found under its key")

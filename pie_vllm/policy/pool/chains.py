"""Doubly linked lists of numbers, in arrays indexed by the number."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from pie_vllm.errors import IntegrityError

NO_CHAIN = -1


class Chains:
    """Some lists over the numbers below ``count``; each number is in one list or none.

    Nine bytes a number. Each operation costs the same few array accesses,
    however long the lists are and whatever left them before.

    Attributes:
        chain: by number, the list it is in, or ``NO_CHAIN``.
        length: by list, how many numbers are in it.
    """

    def __init__(self, count: int, chains: int) -> None:
        """Start with ``chains`` empty lists, named 0, 1, ..."""
        # Each list is a ring through an end of its own, behind the numbers.
        self._count = count
        self._next = array("i", bytes(4 * count)) + array("i", range(count, count + chains))
        self._before = self._next[:]
        self.chain = array("b", [NO_CHAIN]) * count
        self.length = [0] * chains

    def append(self, chain: int, number: int) -> None:
        """Put a number that is in no list at the young end of one."""
        end = self._count + chain
        youngest = self._before[end]
        self._next[youngest] = number
        self._before[number] = youngest
        self._next[number] = end
        self._before[end] = number
        self.chain[number] = chain
        self.length[chain] += 1

    def remove(self, number: int) -> int:
        """Take a number out of the list it is in; returns the list."""
        before, after = self._before[number], self._next[number]
        self._next[before] = after
        self._before[after] = before
        chain = self.chain[number]
        self.chain[number] = NO_CHAIN
        self.length[chain] -= 1
        return chain

    def oldest(self, chain: int) -> int:
        """The number that joined a list first of all in it; -1 when it is empty."""
        number = self._next[self._count + chain]
        return number if number < self._count else -1

    def walk(self, chain: int) -> Iterator[int]:
        """The numbers of a list, oldest first; it may not change meanwhile."""
        number = self._next[self._count + chain]
        while number < self._count:
            yield number
            number = self._next[number]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless links, lengths and marks agree."""
        listed = 0
        for chain, length in enumerate(self.length):
            numbers = list(self.walk(chain))
            if len(numbers) != length or any(self.chain[n] != chain for n in numbers):
                raise IntegrityError(f"list {chain}: its length or a mark is wrong")
            end = self._count + chain
            for before, number in zip([end, *numbers], [*numbers, end], strict=True):
                if self._before[number] != before:
                    raise IntegrityError(f"list {chain}: a link back is wrong")
            listed += length
        if listed != sum(chain != NO_CHAIN for chain in self.chain):
            raise IntegrityError("a number is marked and in no list")

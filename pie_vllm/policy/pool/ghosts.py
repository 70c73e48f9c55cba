"""What is remembered of KV that is not parked any more."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.chains import NO_CHAIN, Chains
from pie_vllm.policy.pool.key_table import KeyTable


class Ghosts:
    """Lists of keys seen before, without the keys: 25 bytes each, in arrays made once.

    A key is known by its hash alone, 64 bits for bytes. Two keys of one hash
    pass for each other; all that can do is to misjudge the worth of one block.

    At most ``capacity`` are remembered, of all lists together; to make room, the
    longest list forgets its oldest.
    """

    def __init__(self, capacity: int, lists: int) -> None:
        """Remember nothing yet; the lists are named 0, 1, ..."""
        self.capacity = capacity
        self._lists = lists
        self._chains = Chains(capacity, lists + 1)
        for number in range(capacity):
            self._chains.append(lists, number)
        self._table = KeyTable(capacity, array("q", bytes(8 * capacity)))

    def __len__(self) -> int:
        """How many keys are remembered."""
        return len(self._table)

    def length(self, chain: int) -> int:
        """How many keys are remembered in a list."""
        return self._chains.length[chain]

    def remember(self, chain: int, key: Hashable) -> None:
        """Note a key as the youngest of a list, and in no other."""
        self.recall(key)
        if not self.capacity:
            return
        chains, free = self._chains, self._lists
        if not chains.length[free]:
            lengths = chains.length[:free]
            self._forget(chains.oldest(lengths.index(max(lengths))))
        number = chains.oldest(free)
        chains.remove(number)
        chains.append(chain, number)
        self._table.add(hash(key), number)

    def recall(self, key: Hashable) -> int:
        """The list that a key is in, or ``NO_CHAIN``; it is forgotten."""
        number = self._table.find(hash(key))
        return self._forget(number) if number >= 0 else NO_CHAIN

    def _forget(self, number: int) -> int:
        self._table.remove(number)
        chain = self._chains.remove(number)
        self._chains.append(self._lists, number)
        return chain

    def clear(self) -> None:
        """Forget all."""
        for chain in range(self._lists):
            while (number := self._chains.oldest(chain)) >= 0:
                self._forget(number)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless lists and table agree."""
        self._chains.check_integrity()
        self._table.check_integrity()
        if sum(self._chains.length[: self._lists]) != len(self._table):
            raise IntegrityError("ghosts: lists and table disagree")
        if sum(self._chains.length) != self.capacity:
            raise IntegrityError("ghosts: a place is lost")

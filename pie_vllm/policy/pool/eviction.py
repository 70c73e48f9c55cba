"""Which parked block goes first: what a policy is told and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

from pie_vllm.policy.pool.chains import NO_CHAIN, Chains


class Eviction(ABC):
    """The order of the parked rows, and the structure that keeps it.

    A row is *in order* (it may be chosen), *held* (parked, may not be chosen
    now) or unknown. All calls cost constant time, whatever is parked.
    """

    def __init__(self, capacity_rows: int, chains: int) -> None:
        """Start without rows; ``chains`` are the lists that the order is made of."""
        self.rows = Chains(capacity_rows, chains)

    @abstractmethod
    def park(self, row: int, key: Hashable) -> None:
        """The KV of ``key`` came to be parked in an unknown row: it is in order now."""

    @abstractmethod
    def use(self, row: int) -> None:
        """A row in order was used and stays."""

    @abstractmethod
    def use_held(self, row: int) -> None:
        """As ``use``, for a held row: it counts when the row is released."""

    @abstractmethod
    def take(self, row: int, key: Hashable) -> None:
        """A row in order was used and leaves; ``key`` may be parked again."""

    @abstractmethod
    def choose(self) -> int:
        """The row in order that is worth least; -1 when there is none. Changes nothing."""

    @abstractmethod
    def evict(self, row: int, key: Hashable) -> None:
        """The row chosen leaves, because its room is needed."""

    @abstractmethod
    def hold(self, row: int) -> None:
        """A row in order is not to be chosen until ``release``."""

    @abstractmethod
    def release(self, row: int) -> None:
        """A held row is in order again, as young as one just used."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all, what was seen before too; no row is held."""

    def drop(self, row: int) -> None:
        """A row in order leaves for reasons that say nothing about its worth."""
        self.rows.remove(row)

    def in_order(self, row: int) -> bool:
        """Whether a row may be chosen."""
        return self.rows.chain[row] != NO_CHAIN

    @property
    def num_in_order(self) -> int:
        """How many rows may be chosen."""
        return sum(self.rows.length)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the structure is sound."""
        self.rows.check_integrity()

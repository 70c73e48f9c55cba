"""The last blocks of preempted requests, which are not full and so have no hash to be parked by."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pie_vllm.policy.pool.step_copies import StepCopies


class Tail(NamedTuple):
    """One such block.

    Attributes:
        row: row that holds it.
        index: its place in the request's table.
        tokens: number of the request's tokens, from its first on, whose KV is complete with it.
    """

    row: int
    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    tokens: int


class Tails:
    """Tails by request, each in a parked row of its own, until the request is admitted or gone.

    A tail that was taken belongs to the request's admission: it is restored or put back.
    """

    def __init__(self, copies: StepCopies) -> None:
        """Start without tails; ``copies`` are those of the coming step."""
        self._copies = copies
        self._tails: dict[str, Tail] = {}

    def __len__(self) -> int:
        """Number of tails."""
        return len(self._tails)

    def rows(self) -> list[int]:
        """The rows that hold them."""
        return [tail.row for tail in self._tails.values()]

    def keep(self, request_id: str, tail: Tail) -> None:
        """Keep the tail of a request in place of an older one."""
        self.drop(request_id)
        self._tails[request_id] = tail

    def drop(self, request_id: str) -> None:
        """Forget the tail of a request; no change where there is none."""
        tail = self._tails.pop(request_id, None)
        if tail is not None:
            self._copies.free(tail.row)

    def drop_oldest(self) -> None:
        """Forget the tail that was kept first; no change where there is none."""
        if self._tails:
            self.drop(next(iter(self._tails)))

    def drop_in(self, requests: Collection[str], rows: Collection[int]) -> None:
        """Forget the tails of these requests, and those in these rows."""
        for name in [n for n, t in self._tails.items() if n in requests or t.row in rows]:
            self.drop(name)

    def clear(self) -> None:
        """Forget all."""
        for name in [*self._tails]:
            self.drop(name)

    def find(self, request_id: str) -> Tail | None:
        """The tail that the coming step can restore; not one that this very step stores."""
        tail = self._tails.get(request_id)
        return None if tail is None or tail.row in self._copies.stores else tail

    def take(self, request_id: str) -> Tail:
        """Take the tail of a request that is about to be admitted; its row lasts for the step."""
        tail = self._tails.pop(request_id)
        self._copies.leaving.add(tail.row)
        return tail

    def put_back(self, request_id: str, tail: Tail) -> None:
        """Keep a tail that was taken after all: the request was not admitted."""
        self._copies.leaving.remove(tail.row)
        self._tails[request_id] = tail

    def restore(self, tail: Tail, resident: int) -> None:
        """Have the coming step fill a resident page with a tail that was taken."""
        self._copies.restores[resident] = tail.row

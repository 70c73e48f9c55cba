"""What the ranks of one engine tell each other about their pools, beside the steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from pie_vllm.plan import PoolOrder, PoolState

logger = logging.getLogger("vllm.pie")

SOON, SELDOM, NEVER = 0.02, 0.5, 3600.0
"""Seconds between looks at the other ranks' notes: at first, later, and with nothing to hear."""


class Store(Protocol):
    """What is needed of torch's distributed stores."""

    def set(self, key: str, value: str) -> None:
        """Write a note."""

    def check(self, keys: list[str]) -> bool:
        """Whether all these notes were written."""

    def get(self, key: str) -> bytes:
        """Read a note that was written."""


class Board:
    """Notes of all ranks in a store that they share; no rank ever waits for another.

    vLLM's executor returns one rank's output of a step, so the state of the pool that reaches the
    scheduler is that of the leader. It reports what all ranks hold: for another rank, what its
    newest note says, cut to what was ordered since. Only the leader decides that the leave
    to give memory back is used, since its report is what the scheduler asks for; the others
    follow its note.

    The keeper's thread calls ``exchange``, which talks to the store. All else touches memory only.

    Attributes:
        leads: whether this is the rank whose output vLLM returns.
    """

    def __init__(
        self, store: Store, rank: int, ranks: int, name: str, first_chunks: int = 1
    ) -> None:
        """Join a board; nothing is known of the others.

        Args:
            store: the store that all ranks share.
            rank: number of this process among the ranks; 0 leads.
            ranks: number of ranks.
            name: name of this board in the store, the same on all ranks and never used before.
            first_chunks: chunks that each rank holds from the start and never gives back.
        """
        self.leads = rank == 0
        self._store = store
        self._key = f"{name}/{rank}"
        self._release_key = f"{name}/release"
        self._others = [f"{name}/{other}" for other in range(1, ranks)] if self.leads else []
        self._lock = threading.Lock()
        self._first = first_chunks
        self._known = dict.fromkeys(self._others, first_chunks)
        self._refused = dict.fromkeys(self._others, 0)
        self._least_number = 0
        self._posted: PoolState | None = None
        self._release: int | None = None
        self._release_posted: int | None = None
        self._wait = SOON
        self._failed = False

    def least(self, own: PoolState) -> PoolState:
        """What all ranks hold, as far as this one may speak for them."""
        with self._lock:
            chunks = min([own.chunks, *self._known.values()])
            refused = own.refused + sum(self._refused.values())
        return own._replace(chunks=chunks, refused=refused)

    def follow(self, order: PoolOrder) -> None:
        """Note that this rank follows an order; the others will hold no more than that."""
        with self._lock:
            self._least_number = max(self._least_number, order.number)
            self._cut(order.chunks)

    def release(self, order: PoolOrder) -> None:
        """The leader uses the leave of an order; the others may, from its note on."""
        with self._lock:
            self._least_number = order.number + 1  # Older notes say what there was before.
            self._cut(self._first)
            self._release = order.number

    def released(self, order: PoolOrder) -> bool:
        """Whether the leader has used the leave of an order."""
        return self._release == order.number

    def news(self, own: PoolState) -> bool:
        """Whether there is something that the others were not told."""
        return own != self._posted or (self.leads and self._release != self._release_posted)

    def exchange(self, own: PoolState, *, idle: bool) -> float:
        """Write and read notes.

        Args:
            own: what this rank holds.
            idle: whether it has leave to give back what it holds.

        Returns:
            Seconds after which to look again.
        """
        try:
            self._post(own)
            if self.leads:
                self._hear(self._others)
            elif idle and self._store.check([self._release_key]):
                self._release = int(self._store.get(self._release_key))
        except RuntimeError as error:  # Another rank is gone, so the engine ends, too.
            if not self._failed:
                logger.warning("Pie: the ranks do not hear of each other's pools: %s", error)
            self._failed, self._posted, self._release_posted = True, own, self._release
            return SELDOM
        with self._lock:
            behind = any(chunks < own.chunks for chunks in self._known.values())
        if not behind and not (idle and not self.leads and own.chunks > self._first):
            self._wait = SOON
            return NEVER
        wait, self._wait = self._wait, min(1.25 * self._wait, SELDOM)
        return wait

    def _post(self, own: PoolState) -> None:
        if own != self._posted:
            self._store.set(self._key, f"{own.number} {own.chunks} {own.refused}")
            self._posted = own
        if self.leads and self._release != self._release_posted:
            self._store.set(self._release_key, str(self._release))
            self._release_posted = self._release

    def _hear(self, others: Sequence[str]) -> None:
        for key in others:
            if not self._store.check([key]):
                continue
            number, chunks, refused = map(int, self._store.get(key).split())
            with self._lock:
                self._refused[key] = max(self._refused[key], refused)
                if number >= self._least_number:
                    self._known[key] = chunks

    def _cut(self, chunks: int) -> None:
        self._known = {key: min(known, chunks) for key, known in self._known.items()}

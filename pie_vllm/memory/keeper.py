"""Takes and gives back the pool's memory beside the steps, in a thread of its own."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from pie_vllm.errors import PieError, TransferError
from pie_vllm.policy.elastic import PoolOrder, PoolState
from pie_vllm.policy.plan import Copy

logger = logging.getLogger("vllm.pie")


NICENESS = 10
"""Of the thread beside the process's own: filling fresh memory must not take a core from a step."""


class Chunks(Protocol):
    """What the keeper needs of the transfer engine."""

    def commit_chunk(self, chunk: int) -> None:
        """Take the memory of a chunk."""

    def release_chunk(self, chunk: int) -> None:
        """Give it back once its copies are over."""


class _OneCall:
    """An engine's calls, each of which holds a lock."""

    def __init__(self, engine: Chunks, lock: threading.Lock) -> None:
        self._engine, self._lock = engine, lock

    def commit_chunk(self, chunk: int) -> None:
        with self._lock:
            self._engine.commit_chunk(chunk)

    def release_chunk(self, chunk: int) -> None:
        with self._lock:
            self._engine.release_chunk(chunk)


class PoolKeeper:
    """Holds the first chunks of the pool: as many as were ordered last.

    The engine's thread calls ``prepare`` and ``follow``; they take microseconds
    unless a step needs a chunk that is not there yet. A chunk that cannot be
    had is no error then: it is said once, and the scheduler is told.

    Attributes:
        waits: steps that waited for a chunk.
        waited_seconds: how long, in all.
    """

    def __init__(self, engine: Chunks, chunk_rows: int, *, idle_seconds: float) -> None:
        """Start the thread.

        Args:
            engine: whose chunks these are; it holds the first one.
            chunk_rows: rows of a chunk.
            idle_seconds: as the scheduler's; see ``ElasticPool``.
        """
        self._calls = threading.Lock()
        self._engine: Chunks = _OneCall(engine, self._calls)
        self._chunk_rows = chunk_rows
        self._idle_seconds = idle_seconds
        self._ready = self._wanted = 1
        self._refused = 0
        self._order: PoolOrder | None = None
        self._expires = math.inf
        self._closing = False
        self._changed = threading.Condition()
        self.waits = 0
        self.waited_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="pie-pool", daemon=True)
        self._thread.start()

    @property
    def state(self) -> PoolState:
        """What there is now."""
        return PoolState(self._ready, self._refused)

    def prepare(self, stores: Sequence[Copy]) -> None:
        """Before a step that stores: return when the rows are there.

        Raises:
            TransferError: the memory cannot be had.
        """
        if not stores:
            return
        # No run crosses a chunk.
        chunks = max(copy.row for copy in stores) // self._chunk_rows + 1
        start = time.perf_counter()
        with self._changed:
            self._expires = math.inf  # Not before the order that comes with this step.
            self._wanted = max(self._wanted, chunks)
            if chunks <= self._ready:
                return
            refused = self._refused
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._ready >= chunks or self._refused > refused or self._closing
            )
            if self._ready < chunks:
                raise TransferError(
                    f"chunk {self._ready} of the CPU pool cannot be had, and a step needs "
                    f"{chunks}. Free CPU memory, or lower --pie-pool-gib."
                )
        self.waits += 1
        self.waited_seconds += time.perf_counter() - start

    def follow(self, order: PoolOrder) -> None:
        """Note the order of a step, after the step's copies were submitted."""
        if order.idle:  # Set without the lock: the thread looks again when the old time is up.
            self._expires = time.monotonic() + 2 * self._idle_seconds
        if order is self._order:
            return
        with self._changed:
            self._order = order
            self._wanted = order.chunks
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No chunk comes or goes meanwhile: what is under way ends first.

        For captures of CUDA graphs: registering memory and waiting for streams, by whatever thread,
        break one that is under way. Steps that need another chunk must not run in it.
        """
        with self._calls:
            yield

    def close(self) -> None:
        """End the thread; the engine keeps what it holds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        _step_back()
        try:
            while (chunk := self._next()) is not None:
                if chunk < self._ready:
                    self._shrink(chunk)
                else:
                    self._grow(chunk)
        finally:  # Whoever waits must not wait for a thread that is gone.
            with self._changed:
                self._closing = True
                self._changed.notify_all()

    def _next(self) -> int | None:
        """The chunk to release (below ``_ready``) or commit next; None to end."""
        with self._changed:
            while not self._closing:
                idle = self._order is not None and self._order.idle
                left = self._expires - time.monotonic() if idle and self._ready > 1 else math.inf
                if left <= 0:
                    logger.info(
                        "Pie: idle for %.0f s, so %d of %d chunks of the CPU pool go back",
                        2 * self._idle_seconds,
                        self._ready - 1,
                        self._ready,
                    )
                    self._wanted, self._expires = 1, math.inf
                if self._wanted < self._ready:
                    return self._ready - 1
                if self._wanted > self._ready:
                    return self._ready
                self._changed.wait(None if left == math.inf else left)
            return None

    def _shrink(self, chunk: int) -> None:
        with self._changed:
            if self._wanted > chunk:  # asked for again meanwhile
                return
            self._ready = chunk
        self._engine.release_chunk(chunk)

    def _grow(self, chunk: int) -> None:
        try:
            self._engine.commit_chunk(chunk)
        except PieError as error:
            with self._changed:
                self._refused += 1
                self._wanted = self._ready
                self._changed.notify_all()
            if self._refused == 1:
                logger.warning(
                    "Pie: the CPU pool stays at %d chunks, because memory for one more cannot be "
                    "had: %s",
                    self._ready,
                    error,
                )
            return
        with self._changed:
            self._ready = chunk + 1
            self._changed.notify_all()


def _step_back() -> None:
    """Lower the priority of the calling thread, where a thread can have its own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        own = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(own + NICENESS, 19))

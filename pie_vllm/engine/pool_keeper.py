"""Takes and gives back the pool's memory beside the steps, in a thread of its own."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from pie_vllm.engine.pool_board import Board
from pie_vllm.errors import IntegrityError, PieError
from pie_vllm.plan import RETRY_SECONDS, PoolOrder, PoolState, Runs

logger = logging.getLogger("vllm.pie")


NICENESS = 10
"""Niceness added to the thread: filling fresh memory must not take a core from a step."""

WAIT_SECONDS_MAX = 3600.0
"""Seconds that the thread sleeps in one piece; a longer idle time takes several."""


class Chunks(Protocol):
    """What the keeper needs of the transfer engine."""

    def commit_chunk(self, chunk: int) -> None:
        """Take the memory of a chunk."""

    def release_chunk(self, chunk: int) -> None:
        """Give it back once its copies are over."""


class _OneCall:
    """An engine's calls, one at a time, and none in a pause."""

    def __init__(self, engine: Chunks) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._going_on = threading.Event()
        self._going_on.set()

    def commit_chunk(self, chunk: int) -> None:
        with self._turn():
            self._engine.commit_chunk(chunk)

    def release_chunk(self, chunk: int) -> None:
        with self._turn():
            self._engine.release_chunk(chunk)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        # A lock alone is not fair: call after call might come before who wants a pause.
        self._going_on.wait()
        with self._lock:
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the call under way; no other begins meanwhile."""
        self._going_on.clear()
        try:
            with self._lock:
                yield
        finally:
            self._going_on.set()


class PoolKeeper:
    """Holds the first chunks of the pool: as many as were ordered last.

    The engine's thread calls ``prepare`` and ``follow``; they take microseconds and wait for no
    memory. Nothing is given back but by an order: fewer chunks, or leave to give back all but the
    first ones when no other order comes for the idle time (``PoolOrder.idle``). What is released by
    leave is reported before the scheduler names a row of it again, so this clock may be as early
    or as late as it likes. A chunk that cannot be had is no error: it is said once, the scheduler
    is told, and it is tried again later while the order stands.

    Several ranks share a board. One of them leads: its reports speak for all, and the others
    release by leave only where it has.
    """

    def __init__(
        self,
        engine: Chunks,
        chunk_rows: int,
        *,
        idle_seconds: float,
        first_chunks: int = 1,
        budget: Callable[[], AbstractContextManager[object]] = nullcontext,
        board: Board | None = None,
    ) -> None:
        """Start the thread.

        Args:
            engine: the engine whose chunks these are; it holds the first ones.
            chunk_rows: rows of a chunk.
            idle_seconds: seconds without an order after which the leave to give back is used;
                ``inf`` is never.
            first_chunks: number of chunks that the engine holds already; they are never given back.
            budget: entered around the taking of one chunk; raises PieError to refuse it.
            board: what the ranks tell each other; None is a single rank.
        """
        self._engine = _OneCall(engine)
        self._chunk_rows = chunk_rows
        self._idle_seconds = idle_seconds
        self._budget = budget
        self._board = board
        self._first = self._ready = self._wanted = first_chunks
        self._refused = self._released = 0
        self._order = PoolOrder(first_chunks)
        self._unheard = -1
        self._expires = self._retry = math.inf
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pie-pool", daemon=True)
        self._thread.start()

    @property
    def state(self) -> PoolState:
        """What can be counted on, of all ranks if this one leads."""
        with self._changed:
            own = self._own()
            return own if self._board is None else self._board.least(own)

    @property
    def held(self) -> int:
        """Chunks whose memory this rank has now."""
        return self._ready

    @property
    def refused(self) -> int:
        """How often memory could not be had here."""
        return self._refused

    def prepare(self, *runs: Runs | None) -> None:
        """Before a step: refuse it if it names a row whose memory is not held.

        Args:
            runs: all copies of its plan; None for those of the step before.

        Raises:
            IntegrityError: there is such a row. The scheduler never plans one.
        """
        # No run crosses a chunk.
        row = max((int(r[:, 1].max()) for r in runs if r is not None and len(r)), default=-1)
        held = min(self._ready, self._wanted)
        if row >= held * self._chunk_rows:
            raise IntegrityError(
                f"a step names row {row} of the CPU pool, of whose chunks of {self._chunk_rows} "
                f"rows the first {held} are held. This is an error of pie_vllm: please report it, "
                "and use --block-manager default until then."
            )

    def follow(self, order: PoolOrder) -> None:
        """Note the order of a step, after the step's copies were submitted."""
        if order == self._order and not order.idle:
            return
        with self._changed:
            if order.chunks != self._order.chunks:
                self._retry = -math.inf
            if self._order.idle and self._wanted < self._order.chunks:
                self._unheard = order.number
            # What was given back by leave is not taken again before the scheduler has heard of it.
            heard = order.number != self._unheard
            self._order, self._wanted = order, order.chunks if heard else self._first
            self._expires = time.monotonic() + self._idle_seconds if order.idle else math.inf
            if self._board is not None:
                self._board.follow(order)
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No chunk comes or goes meanwhile: what is under way ends first.

        For captures of CUDA graphs: registering memory and waiting for streams, by whatever thread,
        break one that is under way. Steps that need another chunk must not run in it.
        """
        with self._engine.paused():
            yield

    def close(self) -> None:
        """End the thread; the engine keeps what it holds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _own(self) -> PoolState:
        sure = min(self._ready, self._wanted)
        return PoolState(sure, self._refused, self._order.number, self._released)

    def _run(self) -> None:
        _step_back()
        while not self._closing:
            wait = WAIT_SECONDS_MAX
            if self._board is not None:
                with self._changed:
                    own, idle = self._own(), self._order.idle
                wait = self._board.exchange(own, idle=idle)
            chunk = self._next(wait)
            if chunk is None:
                continue
            if chunk < self._ready:
                self._shrink(chunk)
            else:
                self._grow(chunk)

    def _next(self, wait: float) -> int | None:
        """The chunk to release (below ``_ready``) or commit next; None after waiting for one."""
        with self._changed:
            if self._may_release() and not self._closing:
                if self._ready > self._first:
                    logger.info(
                        "Pie: idle for %.0f s, so %d of %d chunks of the CPU pool go back",
                        self._idle_seconds,
                        self._ready - self._first,
                        self._ready,
                    )
                self._wanted, self._expires = self._first, math.inf
                self._released += 1
                if self._board is not None:
                    self._board.release(self._order)
            if self._closing:
                return None
            if self._wanted < self._ready:
                return self._ready - 1
            now = time.monotonic()
            if self._wanted > self._ready and now >= self._retry:
                return self._ready
            if self._board is None or not self._board.news(self._own()):
                retry = self._retry - now if self._wanted > self._ready else math.inf
                left = self._expires - now if self._wanted > self._first else math.inf
                self._changed.wait(max(0.0, min(wait, left, retry, WAIT_SECONDS_MAX)))
            return None

    def _may_release(self) -> bool:
        """Whether the leave of the newest order is used now."""
        if not self._order.idle or self._wanted <= self._first:
            return False
        if self._board is not None and not self._board.leads:
            return self._board.released(self._order)
        return time.monotonic() >= self._expires

    def _shrink(self, chunk: int) -> None:
        with self._changed:
            if self._wanted > chunk:  # asked for again meanwhile
                return
            self._ready = chunk
        self._engine.release_chunk(chunk)

    def _grow(self, chunk: int) -> None:
        try:
            with self._budget():
                self._engine.commit_chunk(chunk)
        except PieError as error:
            with self._changed:
                self._refused += 1
                self._retry = time.monotonic() + RETRY_SECONDS
            if self._refused == 1:
                logger.warning(
                    "Pie: the CPU pool stays at %d chunks for now, because memory for one more "
                    "cannot be had: %s Requests wait or are preempted for what is missing. Free "
                    "CPU memory, or lower --pie-pool-gib.",
                    self._ready,
                    error,
                )
            return
        with self._changed:
            self._ready = chunk + 1


def _step_back() -> None:
    """Lower the priority of the calling thread, where a thread can have its own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        own = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(own + NICENESS, 19))

"""How much CPU memory the pool holds: grown ahead of what is pooled, given back when idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pie_vllm.policy.geometry import Geometry, cdiv

DEFAULT_IDLE_SECONDS = 60.0
FREE_MARGIN = 512 << 20
"""Bytes of free CPU memory that the pool leaves alone when it grows."""

LOOK_STEPS = 16
"""Between looks at what the pool needs while nothing changes: a look takes some microseconds."""

CHECK_SECONDS = 1.0
"""Between looks at the free memory, which cost some system calls."""


class PoolOrder(NamedTuple):
    """What the workers are to hold, sent with every step.

    Attributes:
        chunks: of the pool, from the first on.
        idle: no request has pooled KV: when no step follows for twice the idle
            time, all chunks but the first may go.
    """

    chunks: int
    idle: bool


class PoolState(NamedTuple):
    """What a worker holds, sent with every result.

    Attributes:
        chunks: of the pool, from the first on.
        refused: how often memory could not be had.
    """

    chunks: int
    refused: int = 0


class ElasticPool:
    """Decides how many chunks of the pool there are to be.

    Chunks are the pool's rows in order, and low rows are handed out first, so
    the pool is a prefix of chunks. It is ordered ahead of what is used by one
    chunk and an eighth, so that the workers fill it beside the steps; a step
    that needs a chunk sooner waits for it. Nothing here changes a schedule,
    unless CPU memory is scarce: then rows beyond what there is are withheld.

    After ``idle_seconds`` in which less was needed, the pool shrinks to what
    was needed at most meanwhile. When no request has pooled KV and no step
    comes, there is nobody to say so: the workers then give all but one chunk
    back after twice that time, and here the pool counts as empty after once
    that time, so that a step on its way never names what is gone.

    Attributes:
        order: the newest order.
        usable: chunks whose rows may be used.
        state: what the worker reported last.
    """

    def __init__(
        self,
        geometry: Geometry,
        least_blocks: int,
        free_memory: Callable[[], int],
        clock: Callable[[], float],
        idle_seconds: float = DEFAULT_IDLE_SECONDS,
    ) -> None:
        """Begin with one chunk.

        Args:
            geometry: the sizes.
            least_blocks: pooled blocks that are granted however scarce memory
                is: what one request of the longest context needs.
            free_memory: bytes that can still be taken from the system.
            clock: seconds that never run backwards.
            idle_seconds: how long the pool keeps what is not needed.
        """
        self._chunks = geometry.num_chunks
        self._chunk_bytes = geometry.chunk_rows * geometry.row_bytes
        self._least = min(self._chunks, cdiv(max(least_blocks, 1), geometry.chunk_rows))
        self._free_memory = free_memory
        self._idle_seconds = idle_seconds
        self._clock = clock
        self.order = PoolOrder(1, idle=True)
        self.usable = self._chunks
        self.state = PoolState(1)
        self._steps = 0
        self._due = False
        self._last_step = self._looked = self._since = clock()
        self._peak = 1
        self._refused_at: float | None = None

    @property
    def scarce(self) -> bool:
        """Whether free CPU memory limits the pool now."""
        return self.usable < self._chunks

    def begin_step(self) -> bool:
        """Before a step: whether what the pool holds counts as gone, so must be forgotten."""
        if not self.order.idle or self.order.chunks == 1:
            return False
        now = self._clock()
        gone = now - self._last_step >= self._idle_seconds
        self._last_step = now
        if gone:
            self.order = PoolOrder(1, idle=True)
        return gone

    def end_step(self, held: int, *, in_use: bool, changed: bool) -> PoolOrder:
        """After a step was planned: the order that travels with it.

        Args:
            held: chunks up to the last one with a row taken.
            in_use: whether a request has pooled blocks.
            changed: whether more may be held than before, or the engine has nothing to run.
        """
        self._steps += 1
        changed |= self._due or in_use == self.order.idle
        if not changed and self._steps % LOOK_STEPS:
            return self.order
        self._due = False
        now = self._last_step = self._clock()
        if held or self.scarce:
            self._look(now, held)
        wanted = max(held, min(held + 1 + held // 8, self.usable))
        chunks = self.order.chunks
        if wanted >= chunks:
            self._since, self._peak = now, 1
            chunks = wanted
        else:
            self._peak = max(self._peak, wanted)
            if now - self._since >= self._idle_seconds or chunks > max(self.usable, wanted):
                chunks = self._peak if chunks <= self.usable else wanted
                self._since, self._peak = now, 1
        if chunks != self.order.chunks or in_use == self.order.idle:
            self.order = PoolOrder(chunks, idle=not in_use)
        return self.order

    def report(self, state: PoolState) -> None:
        """Note what a worker holds."""
        if state.refused > self.state.refused:
            self._refused_at = self._clock()
            self._due = True
        self.state = state

    def _look(self, now: float, held: int) -> None:
        """See what free memory allows; twice a minute only where a worker was refused memory."""
        if now - self._looked < CHECK_SECONDS:
            return
        self._looked = now
        room = (self._free_memory() - FREE_MARGIN) // self._chunk_bytes
        if self._refused_at is not None:
            if now - self._refused_at < 30 * CHECK_SECONDS:
                room = min(room, 0)
            else:
                self._refused_at = None
        usable = min(self._chunks, self.state.chunks + room)
        self.usable = max(usable, self._least, held)

"""How much CPU memory the pool holds: grown ahead of what is pooled, given back when idle."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from pie_vllm.config import POOL_IDLE_SECONDS_DEFAULT
from pie_vllm.geometry import Geometry, cdiv
from pie_vllm.plan import RETRY_SECONDS, PoolOrder, PoolState

FREE_MARGIN = 512 << 20
"""Bytes of free CPU memory that a growing pool leaves to others."""

LOOK_STEPS = 16
"""Number of steps between looks at the pool's need while nothing changes; a look takes some
microseconds."""

CHECK_SECONDS = 1.0
"""Seconds between looks at the free memory, each of which costs some system calls."""

PATIENCE_SECONDS = 1.0
"""Maximum seconds for which the schedule pauses for rows that are on their way."""


class ElasticPool:
    """Decides how many chunks of the pool there are to be, and knows which rows are there.

    Chunks are the pool's rows in order, and low rows are handed out first, so the pool is a prefix
    of chunks. It is ordered ahead of what is used: by one chunk, an eighth, and what two steps can
    take. The workers fill it beside the steps. Rows are handed out only of chunks that were
    reported under the newest order number, so no step names a row that is not there, however late
    a worker or a report is. Where the next step would be held up only by rows on their way, the
    schedule pauses for them, a second at most (``paused``); memory that is refused makes the pool
    smaller, and vLLM then waits or preempts as it does without a pool.

    After ``idle_seconds`` in which less was needed, the pool shrinks to what was needed at most
    meanwhile. An engine with nothing to run gives the workers leave with its last step: they give
    all but the first chunks back after that time by their own clock. From then on nothing here
    counts on those chunks. The next step takes the leave back; if it could name rows beyond the
    first chunks, nothing is scheduled until its report says whether they are still there
    (``asking``).

    Attributes:
        order: the newest order.
        usable: chunks whose rows may be handed out: all ranks hold them.
        ceiling: chunks that free memory allows.
        state: what the workers reported last.
        asking: whether it is not known what of the pool is left, until the newest order's report.
        pauses: times that the schedule paused for rows on their way.
        paused_seconds: for how long in all.
    """

    def __init__(
        self,
        geometry: Geometry,
        least_blocks: int,
        free_memory: Callable[[], int],
        clock: Callable[[], float],
        idle_seconds: float = POOL_IDLE_SECONDS_DEFAULT,
        *,
        step_blocks: int = 0,
        ranks: int = 1,
        first_chunks: int = 1,
    ) -> None:
        """Begin with the first chunks.

        Args:
            geometry: the sizes.
            least_blocks: pooled blocks for which the margin of free memory is given up: what one
                request of the longest context needs.
            free_memory: bytes that can still be taken from the system.
            clock: seconds that never run backwards.
            idle_seconds: how long the pool keeps what is not needed.
            step_blocks: rows that one step may take.
            ranks: how many take a chunk of the same memory at once.
            first_chunks: chunks that the workers take at start and never give back.
        """
        self._chunks = geometry.num_chunks
        self._chunk_bytes = geometry.chunk_rows * geometry.row_bytes * ranks
        self._ahead = cdiv(2 * step_blocks, geometry.chunk_rows)
        self._least = min(self._chunks, cdiv(max(least_blocks, 1), geometry.chunk_rows))
        self._free_memory = free_memory
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._first = first_chunks
        self.order = PoolOrder(first_chunks)
        self.usable = first_chunks
        self.ceiling = self._chunks
        self.state = PoolState(first_chunks)
        self.asking = False
        self._gone = False
        self._silent = False
        self._steps = 0
        self._due = False
        self._looked = self._since = clock()
        self._peak = first_chunks
        self._refused_at: float | None = None
        self._paused_at: float | None = None
        self.pauses = 0
        self.paused_seconds = 0.0

    @property
    def scarce(self) -> bool:
        """Whether free CPU memory limits the pool now."""
        return self.ceiling < self._chunks

    @property
    def growing(self) -> bool:
        """Whether rows are on their way that were not refused."""
        return self.order.chunks > self.usable and self._refused_at is None and not self._silent

    @property
    def expected(self) -> int:
        """Chunks that whoever is admitted may count on: those that memory is free for."""
        if self._silent or self._refused_at is not None:
            return self.usable
        return max(self.usable, self.ceiling)

    def settled(self, usable: int) -> bool:
        """Whether a step may begin without a look at the pool.

        Args:
            usable: number of chunks whose rows are handed out now.
        """
        return not (self.order.idle or self.asking or self._gone) and usable == self.usable

    def paused(self, short: bool) -> bool:
        """Whether the coming step schedules nothing.

        Args:
            short: whether the step may want rows that are not there.
        """
        if self.asking:
            return True
        if not (short and self.growing):
            if self._paused_at is not None:
                self.paused_seconds += self._clock() - self._paused_at
                self._paused_at = None
            return False
        now = self._clock()
        if self._paused_at is None:
            self._paused_at = now
            self.pauses += 1
        return now - self._paused_at < PATIENCE_SECONDS

    def begin_step(self, held: int) -> bool:
        """Before a step: take back the leave; whether the workers gave back what is held.

        Then all KV in the pool that no request uses must be forgotten.

        Args:
            held: chunks up to the last one with a row taken.
        """
        if self.order.idle:
            self.order = PoolOrder(self.order.chunks, number=self.order.number + 1)
            self.usable, self.asking = self._first, held > self._first
        if self.asking:
            return False
        gone, self._gone = self._gone, False
        if gone:  # It grows anew, by what is needed.
            self.order = PoolOrder(self._first, number=self.order.number + 1)
            self.usable = self._peak = self._first
            self._since = self._clock()
        return gone and held > self._first

    def end_step(
        self, held: int, *, changed: bool, idle: bool = False, short: bool = False
    ) -> PoolOrder:
        """After a step was planned: the order that travels with it.

        Args:
            held: chunks up to the last one with a row taken.
            changed: whether more may be held than before.
            idle: whether the engine has nothing to run and no request has pooled blocks.
            short: whether the next steps may pool blocks though none is pooled yet.
        """
        self._steps += 1
        if idle or self.asking:
            if idle and self.order.chunks > self._first:
                self.order = self.order._replace(idle=True)
            return self.order
        changed |= self._due or (short and self.order.chunks == self._first < self.ceiling)
        if not changed and self._steps % LOOK_STEPS:
            return self.order
        self._due = False
        now = self._clock()
        if held or short or self.scarce:
            self._look(now, held)
        ahead = held + 1 + held // 8 + (self._ahead if held or short else 0)
        wanted = max(held, min(ahead, self.ceiling), self._first)
        chunks = self.order.chunks
        if wanted >= chunks:
            self._since, self._peak = now, self._first
            chunks = wanted
        else:
            self._peak = max(self._peak, wanted)
            if now - self._since >= self._idle_seconds or chunks > max(self.ceiling, wanted):
                chunks = self._peak if chunks <= self.ceiling else wanted
                self._since, self._peak = now, self._first
        if chunks != self.order.chunks:
            less = chunks < self.order.chunks
            self.order = PoolOrder(chunks, number=self.order.number + less)
            self.usable = min(self.usable, chunks)
        return self.order

    def report(self, state: PoolState) -> None:
        """Note what the workers hold; counts as an answer if it follows the newest order."""
        if state.refused > self.state.refused:
            self._refused_at = self._clock()
            self._due, self._looked = True, -inf
        self._gone |= state.released != self.state.released
        self.state, self._silent = state, False
        if state.number == self.order.number:
            self.usable = max(self._first, min(state.chunks, self.order.chunks))
            self.asking = False

    def unanswered(self, order: PoolOrder) -> None:
        """A step came back without a report: only the first chunks are known to be there.

        Args:
            order: of that step.
        """
        self._silent = True
        if self.asking and order.number == self.order.number:
            self.asking, self._gone = False, True

    def _look(self, now: float, held: int) -> None:
        """See what free memory allows; twice a minute only where a worker was refused memory."""
        if now - self._looked < CHECK_SECONDS:
            return
        self._looked = now
        room = (self._free_memory() - FREE_MARGIN) // self._chunk_bytes
        if self._refused_at is not None:
            if now - self._refused_at < RETRY_SECONDS:
                room = min(room, 0)
            else:
                self._refused_at = None
        ceiling = min(self._chunks, self.state.chunks + room)
        self.ceiling = max(ceiling, self._least, held, self._first)

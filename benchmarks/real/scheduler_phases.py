"""Whole steps of both schedulers in turns: 256 requests that decode, some with pooled blocks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.harness.stats import percentile
from benchmarks.real.bare_schedulers import geometry
from benchmarks.real.scheduler_side import (
    BLOCK_SIZE,
    Side,
    StepTimes,
    difference_of,
    flavour_of,
    steady_heap,
)
from benchmarks.simulated.gpu_machines import H200
from pie_vllm.geometry import Geometry
from pie_vllm.plan import PoolState, StepReport, Totals
from pie_vllm.policy.control.detector import Observation
from pie_vllm.policy.control.step_time_model import OFTEN

PHASES = ("idle", "steady", "demoting", "turns")
"""Phases in the order in which they are measured, one after the other on the same schedulers.

idle: nothing is pooled. steady: blocks are pooled, and the same ones are loaded in every step.
demoting: every new block demotes another, so each step loads others. turns: every other request
with pooled blocks is left out, so each step loads the other half.
"""

REQUESTS = 256
POOLED_REQUESTS = 64
POOLED_EACH = 32
RESIDENT_SHARE = 0.63


class PhaseCost(NamedTuple):
    """One phase, microseconds.

    Attributes:
        stock: median of vLLM's whole step.
        difference: median of what pie's whole step takes longer, shipping included.
        difference_error: standard error of that median.
        difference_p99: the same difference at the 99th percentile of the steps.
        difference_max: the largest one.
        own: median of the time in pie's code, its part of the statistics and of allocations
            included, less what taking the times costs.
        ship: median of the time to pickle and unpickle the orders.
        demotions: mean number of demotions a step.
        pooled: mean number of pooled blocks in use.
    """

    stock: float
    difference: float
    difference_error: float
    difference_p99: float
    difference_max: float
    own: float
    ship: float
    demotions: float
    pooled: float


class _Sample(NamedTuple):
    """One step of both schedulers; nanoseconds and counts."""

    stock: StepTimes
    pie: StepTimes
    own: int
    demotions: int
    pooled: int


def tiers(blocks: int) -> Geometry:
    """So many blocks, resident and pooled; chunks of as many rows as on an H200."""
    resident = int(blocks * RESIDENT_SHARE)
    chunk_rows = H200.geometry().chunk_rows
    return geometry(resident, blocks - resident, chunk_rows=chunk_rows)


class _PieSide(Side):
    """Pie's scheduler over a link that loads any number of blocks in a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As ``Side``."""
        self.totals = Totals()
        super().__init__(*args, **kwargs)
        # As learnt from a link whose budget is the whole window, and no more from every step.
        sizes = self.scheduler.kv_cache_manager.geometry
        loaded = sizes.num_blocks * sizes.row_bytes
        seen = Observation(REQUESTS, REQUESTS, 1.0, 0.0, loaded, 1e-3)
        for _ in range(OFTEN):
            self.scheduler.pie_controller.decider.observe(seen)

    def report(self, output: Any) -> StepReport:
        """Count as if the step had loaded all that it was to load."""
        read_set, before, orders = self.residency.read_set, self.totals, output.pie
        loaded = read_set.num_blocks * self.scheduler.kv_cache_manager.geometry.row_bytes
        self.totals = before._replace(
            steps=before.steps + bool(read_set.num_blocks),
            bytes_loaded=before.bytes_loaded + loaded,
            bytes_finished=before.bytes_finished + loaded,
            load_seconds=before.load_seconds + read_set.num_blocks * 1e-9,
            stall_step=before.stall_step if orders.plan is None else orders.plan.step,
        )
        pool = PoolState(orders.pool.chunks, number=orders.pool.number)
        return StepReport(self.totals, pool, seconds=1.0)

    @property
    def residency(self) -> Any:
        """The policy."""
        return self.scheduler.kv_cache_manager.residency


class _Pair:
    """Both schedulers with the same requests, all past their prompts."""

    def __init__(self, blocks: int, steps: int, asynchronous: bool) -> None:
        """Over so many blocks; each phase has at most so many steps."""
        sizes = tiers(blocks)
        limits: dict[str, Any] = {
            "requests_max": REQUESTS,
            "tokens_max": 1 << 17,
            "length_max": 1 << 13,
        }
        stock, pie = (flavour_of(pie=p, asynchronous=asynchronous) for p in (False, True))
        self.stock = Side(stock, sizes, **limits)
        self.pie = _PieSide(pie, sizes, **limits)
        self._held: list[Any] = []
        for side in (self.stock, self.pie):
            for i in range(REQUESTS):
                pooled = i >= REQUESTS - POOLED_REQUESTS
                full = POOLED_EACH - min(steps // BLOCK_SIZE, POOLED_EACH // 2)
                length = (full if pooled else POOLED_EACH // 2) * BLOCK_SIZE + 1 + i % BLOCK_SIZE
                prompt = [(i * 7 + t) % 997 for t in range(length)]
                prompt[0] = i + 1
                side.add(f"r{i}", prompt, 16 + (len(PHASES) + 1) * steps)
            side.settle()
            side.scheduler.watch_allocations()

    def pool_blocks(self) -> None:
        """Pool blocks of the last requests, and hold all free residents."""
        pie, count = self.pie, POOLED_REQUESTS * POOLED_EACH
        pool, chunks = pie.scheduler.pie_controller.pool, pie.residency.geometry.num_chunks
        # The pool of a server that has run for a while: it is not its growth that is measured.
        pool.order, pool.usable = pool.order._replace(chunks=chunks), chunks
        pie.residency.supply.use_chunks(chunks)
        pie.residency.make_residents_free(count)
        free = pie.residency.queue.free_residents - REQUESTS // BLOCK_SIZE - 2
        self._held = pie.scheduler.kv_cache_manager.block_pool.get_new_blocks(free)
        pie.step()

    def release(self, count: int) -> None:
        """Give residents back that were held, for the next step."""
        given = [self._held.pop() for _ in range(count)]
        self.pie.scheduler.kv_cache_manager.block_pool.free_blocks(given)

    def measure(self, phase: str, steps: int) -> list[_Sample]:
        """The steps of a phase."""
        if phase == "steady":
            self.pool_blocks()
        return [self._sample(phase, turn) for turn in range(steps)]

    def _sample(self, phase: str, turn: int) -> _Sample:
        stock, pie = self.stock, self.pie
        before = pie.residency.demotions
        if phase == "turns":
            _leave_out(stock, turn)
            _leave_out(pie, turn)
        if phase in ("steady", "turns"):
            self.release(REQUESTS // BLOCK_SIZE)
        times = {side: side.step() for side in ((stock, pie) if turn % 2 else (pie, stock))}
        own = pie.own(times[pie]) - stock.own(times[stock])
        own += pie.scheduler.allocating - stock.scheduler.allocating
        done = pie.residency.demotions - before
        return _Sample(times[stock], times[pie], own, done, pie.residency.pooled_in_use)


def _leave_out(side: Side, turn: int) -> None:
    """Leave out every other request of those that hold pooled blocks, from this step."""
    later = side.scheduler.current_step + 2
    for request in side.scheduler.running[-POOLED_REQUESTS:][turn % 2 :: 2]:
        request.next_decode_eligible_step = later


def _cost(samples: Sequence[_Sample]) -> PhaseCost:
    differences = [(s.pie.whole - s.stock.whole) / 1e3 for s in samples]
    difference, error = difference_of([(s.stock.whole, s.pie.whole) for s in samples])
    return PhaseCost(
        stock=median(s.stock.whole for s in samples) / 1e3,
        difference=difference,
        difference_error=error,
        difference_p99=percentile(differences, 99),
        difference_max=max(differences),
        own=median(s.own for s in samples) / 1e3,
        ship=median(s.pie.ship for s in samples) / 1e3,
        demotions=sum(s.demotions for s in samples) / len(samples),
        pooled=sum(s.pooled for s in samples) / len(samples),
    )


def phase_costs(
    blocks: int,
    steps: int,
    rounds: int = 1,
    phases: Sequence[str] = PHASES,
    *,
    asynchronous: bool = True,
) -> dict[str, PhaseCost]:
    """The phases' costs.

    Args:
        blocks: number of blocks, resident and pooled.
        steps: number of steps of each phase and round; ``blocks`` must hold what is decoded.
        rounds: number of times that both schedulers are made anew.
        phases: the phases to measure, in the order of PHASES.
        asynchronous: whether the schedulers are vLLM's asynchronous ones.
    """
    samples: dict[str, list[_Sample]] = {phase: [] for phase in phases}
    for _ in range(rounds):
        pair = _Pair(blocks, steps, asynchronous)
        with steady_heap():
            for phase in phases:
                samples[phase] += pair.measure(phase, steps)
    return {phase: _cost(found) for phase, found in samples.items()}

"""The two schedulers that `benchmarks.scheduler_cost` compares, with their requests."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import thread_time_ns
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from benchmarks.real import bare_schedulers
from pie_vllm.geometry import Geometry
from pie_vllm.plan import PoolState, StepReport, Totals
from pie_vllm.policy.control.detector import Observation
from pie_vllm.policy.control.step_time_model import OFTEN
from pie_vllm.vllm.scheduler_side.scheduler import PieSchedulerMixin

BLOCK_SIZE = 16
REQUESTS = 256
POOLED_REQUESTS = 64
POOLED_EACH = 32
RESIDENT_SHARE = 0.63


def tiers(blocks: int) -> Geometry:
    """So many blocks, resident and pooled."""
    resident = int(blocks * RESIDENT_SHARE)
    return bare_schedulers.geometry(resident, blocks - resident, chunk_rows=4096)


class Timed:
    """Times the methods of the class after it, and the allocations within `schedule`."""

    inner = 0
    allocating = 0

    def schedule(self) -> Any:
        """As the class after this one does."""
        self.allocating = 0
        start = thread_time_ns()
        output = super().schedule()  # type: ignore[misc]
        self.inner = thread_time_ns() - start
        return output

    def update_from_output(self, output: Any, result: Any) -> Any:
        """As the class after this one does."""
        start = thread_time_ns()
        outputs = super().update_from_output(output, result)  # type: ignore[misc]
        self.inner += thread_time_ns() - start
        return outputs

    def watch(self) -> None:
        """Time allocations from now on."""
        pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
        allocate = pool.get_new_blocks

        def get_new_blocks(count: int) -> Any:
            start = thread_time_ns()
            blocks = allocate(count)
            self.allocating += thread_time_ns() - start
            return blocks

        pool.get_new_blocks = get_new_blocks


class Side:
    """One scheduler with all requests past their prompts."""

    def __init__(
        self, flavour: type, sizes: Geometry, steps: int, phases: int, others: int = 0
    ) -> None:
        """Over these sizes, for so many steps; ``others`` may run beside the requests."""
        self.scheduler: Any = bare_schedulers.make(
            sizes,
            BLOCK_SIZE,
            flavour=flavour,
            max_num_seqs=REQUESTS + others,
            max_num_batched_tokens=1 << 17,
            max_num_scheduled_tokens=1 << 17,
            max_model_len=4096,
            async_scheduling=issubclass(flavour, AsyncScheduler),
        )
        self.held: list[Any] = []
        for i in range(REQUESTS):
            pooled = i >= REQUESTS - POOLED_REQUESTS
            full = POOLED_EACH - steps // BLOCK_SIZE if pooled else POOLED_EACH // 2
            prompt = [(i * 7 + t) % 997 for t in range(full * BLOCK_SIZE + 1 + i % BLOCK_SIZE)]
            prompt[0] = i + 1
            self.scheduler.add_request(
                bare_schedulers.make_request(f"r{i}", prompt, 16 + (phases + 1) * steps, BLOCK_SIZE)
            )
        while self.scheduler.waiting or any(r.is_prefill_chunk for r in self.scheduler.running):
            self.step()
        self.scheduler.watch()

    def step(self) -> int:
        """Schedule and take results; returns nanoseconds."""
        start = thread_time_ns()
        output = self.scheduler.schedule()
        seconds = thread_time_ns() - start
        scheduled = output.num_scheduled_tokens
        requests = self.scheduler.requests
        result = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={r: i for i, r in enumerate(scheduled)},
            sampled_token_ids=[[] if requests[r].is_prefill_chunk else [7] for r in scheduled],
        )
        self.report(output, result)
        start = thread_time_ns()
        outputs = self.scheduler.update_from_output(output, result)
        seconds += thread_time_ns() - start
        del outputs  # That is hundreds of objects.
        return seconds

    def report(self, output: Any, result: Any) -> None:
        """Add what a worker says beside the tokens: stock's says nothing."""

    def leave_out(self, turn: int) -> None:
        """Leave out every other request of those that hold pooled blocks, from this step."""
        later = self.scheduler.current_step + 2
        for request in self.scheduler.running[-POOLED_REQUESTS:][turn % 2 :: 2]:
            request.next_decode_eligible_step = later


class PieSide(Side):
    """Pie's scheduler; says how many residents are free before each step."""

    def __init__(
        self, flavour: type, sizes: Geometry, steps: int, phases: int, others: int = 0
    ) -> None:
        """As ``Side``."""
        self.totals = Totals()
        super().__init__(flavour, sizes, steps, phases, others)
        # As learnt from a link whose budget is the whole window, and no more from every step.
        row_bytes = self.scheduler.kv_cache_manager.geometry.row_bytes
        seen = Observation(REQUESTS, REQUESTS, 1.0, 0.0, sizes.num_blocks * row_bytes, 1e-3)
        for _ in range(OFTEN):
            self.scheduler.pie_controller.decider.observe(seen)

    def report(self, output: Any, result: Any) -> None:
        """Add the counters of the engine, as if the step had loaded what it was to load."""
        read_set, before, orders = self.residency.read_set, self.totals, output.pie
        row_bytes = self.scheduler.kv_cache_manager.geometry.row_bytes
        self.totals = before._replace(
            steps=before.steps + bool(read_set.num_blocks),
            bytes_loaded=before.bytes_loaded + read_set.num_blocks * row_bytes,
            bytes_finished=before.bytes_finished + read_set.num_blocks * row_bytes,
            load_seconds=before.load_seconds + read_set.num_blocks * 1e-9,
            stall_step=before.stall_step if orders.plan is None else orders.plan.step,
        )
        pool = PoolState(orders.pool.chunks, number=orders.pool.number)
        result.pie = StepReport(self.totals, pool, seconds=1.0)

    @property
    def residency(self) -> Any:
        """The policy."""
        return self.scheduler.kv_cache_manager.residency

    def fill(self) -> None:
        """Pool the blocks of the last requests, and hold all free residents."""
        count = POOLED_REQUESTS * POOLED_EACH
        self.residency.make_residents_free(count)
        free = self.residency.queue.free_residents - REQUESTS // BLOCK_SIZE - 2
        self.held = self.scheduler.kv_cache_manager.block_pool.get_new_blocks(free)
        self.step()
        assert abs(self.residency.pooled_in_use - count) <= BLOCK_SIZE

    def release(self, count: int) -> None:
        """Make residents free for the next step."""
        given = [self.held.pop() for _ in range(count)]
        self.scheduler.kv_cache_manager.block_pool.free_blocks(given)


def two_sides(
    sizes: Geometry, steps: int, phases: int, asynchronous: bool, others: int = 0
) -> tuple[Side, PieSide]:
    """Stock's scheduler and pie's, over the same blocks."""
    plain: Any = AsyncScheduler if asynchronous else Scheduler
    timed = type("Timed" + plain.__name__, (Timed, plain), {})
    flavour = type("Pie" + plain.__name__, (PieSchedulerMixin, timed), {})
    stock = Side(timed, sizes, steps, phases, others)
    return stock, PieSide(flavour, sizes, steps, phases, others)


def difference_of(times: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """What pie's steps take longer than stock's, microseconds: the median and its error.

    The error is that of a median, from the middle half of the differences.

    Args:
        times: of stock's and of pie's step, nanoseconds.
    """
    differences = sorted(pie - stock for stock, pie in times)
    quarter = len(differences) // 4
    middle_half = differences[-1 - quarter] - differences[quarter]
    return median(differences) / 1e3, 0.93 * middle_half / len(differences) ** 0.5 / 1e3

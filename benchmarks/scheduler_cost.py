"""What does pie add to a scheduler step, compared with stock vLLM's scheduler?

256 running requests that decode, block size 16, so that 16 of them take a block in every step.
64 of them hold 32 pooled blocks each. Both schedulers run the same load in one process, step by
step in turns; no model runs. Four phases:

    idle        nothing is pooled
    steady      2048 blocks pooled, no demotion
    demoting    as steady, and every new block demotes another: about 16 a step
    rotating    as steady, and every other pooled request is left out in turns

Times are CPU time of the thread, so that other work on the machine disturbs little. "stock" and
"pie" are `schedule` and `update_from_output` together. "own" is the time inside `schedule` that is
not vLLM's, plus what allocations take longer than stock's; it is held against the target.
"difference" is pie's step less stock's: it holds what the two do alike too, so it is noisy.

    python -m benchmarks.scheduler_cost [--blocks 10000,100000,1000000] [--steps 64] [--sync]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import thread_time_ns
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from benchmarks.harness.display import console, table, working
from benchmarks.harness.machine import RESULTS, facts, write_json
from pie_vllm.policy.detector import Observation
from pie_vllm.vllm.scheduler import PieSchedulerMixin
from tests.helpers import scheduling

BLOCK_SIZE = 16
REQUESTS = 256
POOLED_REQUESTS = 64
POOLED_EACH = 32
RESIDENT_SHARE = 0.63
TARGET_US = 100.0
PHASES = ("idle", "steady", "demoting", "rotating")


class Cost(NamedTuple):
    """One phase; medians over its steps, microseconds."""

    stock_us: float
    pie_us: float
    own_us: float
    difference_us: float
    difference_error_us: float
    demotions: float
    pooled: float


class Sample(NamedTuple):
    """One step of both schedulers, nanoseconds."""

    stock: int
    pie: int
    own: int
    demotions: int
    pooled: int


class Timed:
    """Times the `schedule` of the class after it, and the allocations within."""

    inner = 0
    allocating = 0

    def schedule(self) -> Any:
        """As the class after this one does."""
        self.allocating = 0
        start = thread_time_ns()
        output = super().schedule()  # type: ignore[misc]
        self.inner = thread_time_ns() - start
        return output

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

    def __init__(self, flavour: type, blocks: int, steps: int) -> None:
        resident = int(blocks * RESIDENT_SHARE)
        self.scheduler: Any = scheduling.make(
            scheduling.geometry(resident, blocks - resident, chunk_rows=4096),
            BLOCK_SIZE,
            flavour=flavour,
            max_num_seqs=REQUESTS,
            max_num_batched_tokens=1 << 17,
            max_num_scheduled_tokens=1 << 17,
            max_model_len=4096,
            async_scheduling=issubclass(flavour, AsyncScheduler),
        )
        self.held: list[Any] = []
        self.scheduling = 0
        for i in range(REQUESTS):
            pooled = i >= REQUESTS - POOLED_REQUESTS
            full = POOLED_EACH - steps // BLOCK_SIZE if pooled else POOLED_EACH // 2
            prompt = [(i * 7 + t) % 997 for t in range(full * BLOCK_SIZE + 1 + i % BLOCK_SIZE)]
            prompt[0] = i + 1
            self.scheduler.add_request(
                scheduling.make_request(f"r{i}", prompt, 16 + (len(PHASES) + 1) * steps, BLOCK_SIZE)
            )
        while self.scheduler.waiting or any(r.is_prefill_chunk for r in self.scheduler.running):
            self.step()
        self.scheduler.watch()

    def step(self) -> int:
        """Schedule and take results; returns nanoseconds."""
        start = thread_time_ns()
        output = self.scheduler.schedule()
        self.scheduling = thread_time_ns() - start
        scheduled = output.num_scheduled_tokens
        requests = self.scheduler.requests
        result = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={r: i for i, r in enumerate(scheduled)},
            sampled_token_ids=[[] if requests[r].is_prefill_chunk else [7] for r in scheduled],
        )
        start = thread_time_ns()
        self.scheduler.update_from_output(output, result)
        return self.scheduling + thread_time_ns() - start

    def leave_out(self, turn: int) -> None:
        """Leave out every other request of those that hold pooled blocks, from this step."""
        later = self.scheduler.current_step + 2
        for request in self.scheduler.running[-POOLED_REQUESTS:][turn % 2 :: 2]:
            request.next_decode_eligible_step = later


class PieSide(Side):
    """Pie's scheduler; says how many residents are free before each step."""

    def __init__(self, flavour: type, blocks: int, steps: int) -> None:
        super().__init__(flavour, blocks, steps)
        # As learnt from a link whose budget is the whole window.
        row_bytes = self.scheduler.kv_cache_manager.geometry.row_bytes
        seen = Observation(REQUESTS, REQUESTS, 1.0, 0.0, blocks * row_bytes, 1e-3)
        self.scheduler.pie_decider.observe(seen)

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


def measure(stock: Side, pie: PieSide, phase: str, steps: int) -> list[Sample]:
    """Steps of a phase; the phases are measured in the order of PHASES, one after the other."""
    if phase == "steady":
        pie.fill()
    samples = []
    for turn in range(steps):
        before = pie.residency.demotions
        if phase == "rotating":
            stock.leave_out(turn)
            pie.leave_out(turn)
        if phase in ("steady", "rotating"):
            pie.release(REQUESTS // BLOCK_SIZE)
        times = {}
        for side in (stock, pie) if turn % 2 else (pie, stock):
            times[side] = side.step()
        own = pie.scheduling - pie.scheduler.inner
        own += pie.scheduler.allocating - stock.scheduler.allocating
        done = pie.residency.demotions - before
        samples.append(Sample(times[stock], times[pie], own, done, pie.residency.pooled_in_use))
    return samples


def cost(samples: Sequence[Sample]) -> Cost:
    """Medians; the error is that of a median, from the middle half of the differences."""
    differences = sorted(s.pie - s.stock for s in samples)
    quarter = len(differences) // 4
    middle_half = differences[-1 - quarter] - differences[quarter]
    return Cost(
        stock_us=median(s.stock for s in samples) / 1e3,
        pie_us=median(s.pie for s in samples) / 1e3,
        own_us=median(s.own for s in samples) / 1e3,
        difference_us=median(differences) / 1e3,
        difference_error_us=0.93 * middle_half / len(differences) ** 0.5 / 1e3,
        demotions=sum(s.demotions for s in samples) / len(samples),
        pooled=sum(s.pooled for s in samples) / len(samples),
    )


def one_round(
    blocks: int, steps: int, phases: Sequence[str] = PHASES, asynchronous: bool = True
) -> dict[str, list[Sample]]:
    """All phases once, over ``blocks`` blocks, resident and pooled."""
    plain: Any = AsyncScheduler if asynchronous else Scheduler
    timed = type("Timed" + plain.__name__, (Timed, plain), {})
    stock = Side(timed, blocks, steps)
    pie = PieSide(type("Pie" + plain.__name__, (PieSchedulerMixin, timed), {}), blocks, steps)
    # As vLLM's engine core does after its start: objects made so far are not scanned again.
    gc.collect()
    gc.freeze()
    try:
        return {phase: measure(stock, pie, phase, steps) for phase in phases}
    finally:
        gc.unfreeze()


def costs(
    blocks: int, steps: int, rounds: int = 1, phases: Sequence[str] = PHASES, **options: Any
) -> dict[str, Cost]:
    """The phases' costs over several rounds."""
    results = [one_round(blocks, steps, phases, **options) for _ in range(rounds)]
    return {phase: cost([s for r in results for s in r[phase]]) for phase in phases}


def summary(result: dict[str, Cost]) -> dict[str, Any]:
    """What the phases say together."""
    idle, steady, demoting, rotating = (result[phase] for phase in PHASES)
    return {
        "phases": {phase: one._asdict() for phase, one in result.items()},
        "own_us": steady.own_us,
        "own_share_of_stock": steady.own_us / steady.stock_us,
        "ns_per_active_pooled_block": 1e3 * (steady.own_us - idle.own_us) / steady.pooled,
        "us_per_demotion": (demoting.own_us - steady.own_us) / demoting.demotions,
        "us_per_rotated_block": (rotating.own_us - steady.own_us) / rotating.pooled,
        "within_target": steady.own_us <= TARGET_US,
    }


def show(results: dict[int, dict[str, Cost]]) -> None:
    """Print a table, and what it says about each number of blocks."""
    rows = [
        [
            f"{n:,} {phase}",
            *(f"{value:,.0f}" for value in one[:2]),
            f"{one.own_us:,.0f}",
            f"{one.difference_us:,.0f} ± {one.difference_error_us:.0f}",
            f"{one.demotions:.1f}",
        ]
        for n, result in results.items()
        for phase, one in result.items()
    ]
    heads = ["blocks, phase", "stock us", "pie us", "own us", "difference us", "demotions a step"]
    table("A scheduler step, medians of CPU time", heads, rows)
    for n, result in results.items():
        said = summary(result)
        console.print(
            f"{n:,} blocks: {said['own_us']:.0f} us in a steady step "
            f"({said['own_share_of_stock']:.1%} of stock's), "
            f"{said['ns_per_active_pooled_block']:.0f} ns for each active pooled block, "
            f"{said['us_per_demotion']:.1f} us for a demotion, "
            f"{said['us_per_rotated_block']:.2f} us for a block that rotates"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduler_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blocks", default="10000,100000,1000000")
    parser.add_argument("--steps", type=int, default=64, help="at most 64 with 10000 blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sync", action="store_true", help="the plain schedulers, not async")
    parser.add_argument("--output", type=Path, default=RESULTS / "scheduler_cost.json")
    args = parser.parse_args()
    results = {}
    for blocks in map(int, args.blocks.split(",")):
        with working(f"{blocks:,} blocks"):
            results[blocks] = costs(blocks, args.steps, args.rounds, asynchronous=not args.sync)
    show(results)
    data = {str(n): summary(result) for n, result in results.items()}
    write_json(
        args.output,
        {"facts": facts(), "asynchronous": not args.sync, "target_us": TARGET_US, "blocks": data},
    )


if __name__ == "__main__":
    main()

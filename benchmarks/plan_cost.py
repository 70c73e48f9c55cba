"""What does a step's plan cost from the policy to the engine, and what does a turn cost?

Plans of scattered blocks, so that each of them is a piece of its own. A step changes one block, so
its plan names all pieces anew. It is cut in parts, microseconds of CPU time of the thread:

    policy    one block leaves, another comes, and the runs to load are taken
    pickled   the step's orders are made to bytes, as vLLM's executor does for its workers
    rank      each rank makes them objects again, checks their rows and hands them to the engine

The whole is policy, pickling, and the ranks one after another, though each is a process of its
own.

A turn is a step in which half of the requests with pooled blocks rest and the other half comes
back: who runs is chosen, and the runs to load are taken. A small turn changes one request for
another.

    python -m benchmarks.plan_cost [--pieces 100,1000,10000,40000] [--ranks 2]
        [--requests 256] [--blocks-each 100]
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from statistics import median
from time import thread_time_ns
from typing import NamedTuple

from benchmarks.harness.display import console, table
from benchmarks.harness.machine import facts, loop_rate
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result
from pie_vllm.engine.native import PlanArrays
from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.plan import NO_RUNS, PoolOrder, StepOrders, StepPlan
from pie_vllm.policy.block import BlockId
from pie_vllm.policy.control.turns import Turns
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.pool.rows import RowLedger

FIRST = 1000
"""The first pooled id."""

TARGET_US = 500.0
"""Upper bound asked of a plan of 10,000 pieces for two ranks, microseconds."""


class PlanCost(NamedTuple):
    """Medians of one plan's parts, in microseconds, and its size in bytes."""

    policy_us: float
    pickled_us: float
    rank_us: float
    whole_us: float
    bytes: int


class TurnCost(NamedTuple):
    """Medians of turns, in microseconds, and the number of blocks that change in one."""

    choice_us: float
    turn_us: float
    small_turn_us: float
    blocks_changed: int


class Memory:
    """A pool that holds all its chunks, for the keeper that checks rows."""

    def commit_chunk(self, chunk: int) -> None:
        """Nothing is to be done."""

    def release_chunk(self, chunk: int) -> None:
        """Nothing is to be done."""


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median CPU time of the thread over some calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begin = thread_time_ns()
        call()
        times.append(thread_time_ns() - begin)
    return median(times) / 1e3


def scattered(requests: int, blocks_each: int) -> tuple[ReadSet, dict[str, list[BlockId]]]:
    """Requests with pooled blocks that are no neighbours, and one id more for each of them."""
    window = 2 * requests * (blocks_each + 1)
    rows = RowLedger(window, FIRST)
    read_set = ReadSet(rows, FIRST, window, window)
    ids = count(FIRST, 2)
    blocks = {
        f"r{i}": [BlockId(next(ids)) for _ in range(blocks_each + 1)] for i in range(requests)
    }
    for name, own in blocks.items():
        for block in own:
            rows.take(block)
        for block in own[:-1]:
            read_set.add(name, block)
    return read_set, blocks


def plan_cost(pieces: int, ranks: int = 2, repeats: int = 51) -> PlanCost:
    """Costs of a plan of so many pieces, for so many ranks."""
    requests = max(1, min(64, pieces // 100))
    read_set, blocks = scattered(requests, pieces // requests)
    read_set.follow(dict.fromkeys(blocks, 1))
    inside, outside = blocks["r0"][0], blocks["r0"][-1]
    steps = count(1)

    def planned() -> StepOrders:
        nonlocal inside, outside
        read_set.discard("r0", inside)
        read_set.add("r0", outside)
        inside, outside = outside, inside
        loads = read_set.take()
        assert loads is not None
        plan = StepPlan(next(steps), NO_RUNS, NO_RUNS, loads, (), forward=True)
        return StepOrders(plan, PoolOrder(1))

    orders = planned()
    blob = pickle.dumps(orders, pickle.HIGHEST_PROTOCOL)
    keeper = PoolKeeper(Memory(), 2 * requests * (pieces + 1), idle_seconds=60)

    def received() -> PlanArrays:
        plan = pickle.loads(blob).plan
        keeper.prepare(plan.stores, plan.promotions, plan.loads)
        return PlanArrays(plan)

    try:
        policy = microseconds(planned, repeats)
        pickled = microseconds(lambda: pickle.dumps(orders, pickle.HIGHEST_PROTOCOL), repeats)
        rank = microseconds(received, repeats)
    finally:
        keeper.close()
    return PlanCost(policy, pickled, rank, policy + pickled + ranks * rank, len(blob))


def turn_cost(requests: int, blocks_each: int, repeats: int = 51) -> TurnCost:
    """Costs of turns among so many requests with so many blocks each."""
    read_set, blocks = scattered(requests, blocks_each)
    names, turns = [*blocks], Turns()
    budget = requests * blocks_each // 2
    resting: set[str] = set()

    def chosen() -> None:
        nonlocal resting
        resting = {*turns.choose(read_set.by_request, budget, 0, others=False)[0]}
        turns.ran(name for name in names if name not in resting)

    def turned(sets: tuple[Mapping[str, int], ...]) -> Callable[[], None]:
        step = count()

        def follow() -> None:
            read_set.follow(sets[next(step) % 2])
            assert read_set.take() is not None

        return follow

    half = requests // 2
    small = [*names[: half - 1], names[half]]
    first, second, other = (dict.fromkeys(n, 1) for n in (names[:half], names[half:], small))
    return TurnCost(
        microseconds(chosen, repeats),
        microseconds(turned((first, second)), repeats),
        microseconds(turned((first, other)), repeats),
        requests * blocks_each,
    )


def main() -> None:
    """The command line."""
    parser = plain_parser("plan_cost", __doc__)
    parser.add_argument("--pieces", default="100,1000,10000,40000")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--blocks-each", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_cost")
    args = parser.parse_args()
    plans = {n: plan_cost(n, args.ranks) for n in map(int, args.pieces.split(","))}
    turn = turn_cost(args.requests, args.blocks_each)
    loops = loop_rate()
    heads = [
        "pieces",
        "policy us",
        "pickled us",
        "a rank us",
        f"whole, {args.ranks} ranks",
        "bytes",
    ]
    rows = [[f"{n:,}", *(f"{part:,.0f}" for part in cost)] for n, cost in plans.items()]
    table("A plan from policy to engine, medians of CPU time", heads, rows)
    console.print(
        f"{args.requests} requests with {args.blocks_each} blocks each: "
        f"{turn.choice_us:,.0f} us to choose who runs, {turn.turn_us:,.0f} us for a turn of "
        f"{turn.blocks_changed:,} blocks, {turn.small_turn_us:,.0f} us for one of "
        f"{2 * args.blocks_each:,}; {loops / 1e6:.0f} million empty loops a second"
    )
    data = {
        "machine": facts(),
        "target_us": TARGET_US,
        "loops_per_second": loops,
        "ranks": args.ranks,
        "plans": {str(n): cost._asdict() for n, cost in plans.items()},
        "turn": turn._asdict(),
    }
    write_result(args.output, data)


if __name__ == "__main__":
    main()

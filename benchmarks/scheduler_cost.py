"""What does pie add to a scheduler step, compared with stock vLLM's scheduler?

256 running requests that decode, block size 16, so that 16 of them take a block in every step.
64 of them hold 32 pooled blocks each. Both schedulers run the same load in one process, step by
step in turns; no model runs. Four phases:

    idle        nothing is pooled
    steady      2048 blocks pooled, no demotion
    demoting    as steady, and every new block demotes another: about 16 a step
    rotating    as steady, and every other pooled request is left out in turns

A fifth case has a pool full of parked blocks, 10^4 to 10^6 of them: beside the 256 requests 4 chats
of 32 blocks come in every step and leave after it. Pie finds all of them parked: each admission
evicts 33 blocks of the prefix cache, which are parked in place of others, and has 32 restored.
Stock, with prefix caching and the same blocks on the device, evicts and finds nothing.

Times are CPU time of the thread, so that other work on the machine disturbs little. "stock" and
"pie" are `schedule` and `update_from_output` together. "own" is the time inside both that is not
vLLM's, plus what allocations take longer than stock's, less what taking the times costs, which
stock's side shows; it is held against the target.
"difference" is pie's step less stock's: it holds what the two do alike too, so it is noisy.

    python -m benchmarks.scheduler_cost [--blocks 10000,100000,1000000]
        [--parked 10000,100000,1000000] [--steps 64] [--sync]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.display import console, table, working
from benchmarks.harness.machine import facts
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result
from benchmarks.real.parked_side import STEPS_MAX, ParkedCost, parked_costs
from benchmarks.real.scheduler_phases import PHASES, Cost, costs

TARGET_US = 100.0
"""Upper bound asked of the CPU time of pie's own code in a steady step, microseconds."""


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


def show_parked(results: dict[int, ParkedCost]) -> None:
    """Print a table of the chats that come back."""
    rows = [
        [
            f"{n:,}",
            f"{one.stock_us:,.0f}",
            f"{one.pie_us:,.0f}",
            f"{one.difference_us:,.0f} ± {one.difference_error_us:.0f}",
            f"{one.stock_admission_us:,.0f}",
            f"{one.pie_admission_us:,.0f}",
            f"{one.pie_lookup_us:,.0f}",
        ]
        for n, one in results.items()
    ]
    heads = ["parked", "stock us", "pie us", "difference us", "admission: stock", "pie", "look-up"]
    table("A step in which 4 chats come back over a full pool", heads, rows)


def main() -> None:
    """The command line."""
    parser = plain_parser("scheduler_cost", __doc__)
    parser.add_argument("--blocks", default="10000,100000,1000000")
    parser.add_argument("--parked", default="10000,100000,1000000")
    parser.add_argument("--steps", type=int, default=64, help="at most 64 with 10000 blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sync", action="store_true", help="the plain schedulers, not async")
    parser.add_argument("--output", type=Path, default=RESULTS / "scheduler_cost")
    args = parser.parse_args()
    results = {}
    for blocks in map(int, args.blocks.split(",")):
        with working(f"{blocks:,} blocks"):
            results[blocks] = costs(blocks, args.steps, args.rounds, asynchronous=not args.sync)
    parked = {}
    for blocks in map(int, args.parked.split(",")):
        with working(f"{blocks:,} parked"):
            steps = min(args.steps, STEPS_MAX)
            parked[blocks] = parked_costs(blocks, steps, args.rounds, not args.sync)
    show(results)
    show_parked(parked)
    data = {str(n): summary(result) for n, result in results.items()}
    facts_of_run = {"machine": facts(), "asynchronous": not args.sync, "target_us": TARGET_US}
    parked_data = {str(n): one._asdict() for n, one in parked.items()}
    write_result(args.output, {**facts_of_run, "blocks": data, "parked": parked_data})


if __name__ == "__main__":
    main()

"""Is pie never slower than stock vLLM, however slow the link is, and does it rise with the link?

The chats of `benchmarks.throughput` at equal device bytes, with the host driver's link held to each
of several speeds per direction ("none" is as fast as memory copies are), between stock vLLM with
the same device bytes and stock vLLM with memory for every chat. Beside each figure stands what the
simulator says of the same chats, see `benchmarks.real.agreement`:

    python -m benchmarks.link_speeds [--speeds 0.1,0.3,1,3,none] [--repeats 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.load import Load
from benchmarks.harness.options import add_redraw, add_speeds, link_keys, parser_of, run_spec
from benchmarks.harness.report import publish, redraw
from benchmarks.harness.rounds import Figures, Question
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.real.agreement import add_simulated
from benchmarks.real.fresh_process import MIB, compare_answers, run_all
from benchmarks.real.link_picture import plot

ASKED = 0.95
"""Ratio to stock at equal bytes that is asked for at every speed, the ring's bytes paid."""


UNUSED_GBPS = 1000.0
"""Speed that stands for an unlimited link over which nothing was loaded: finite, above any."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("link_speeds", __doc__)
    add_redraw(parser)
    add_speeds(parser, "0.1,0.3,1,3,10,none")
    parser.add_argument("--target-slowdown", type=float, default=0.01)
    return parser.parse_args()


def specs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs: two of stock vLLM, and one of pie for each speed."""
    shape = kv_shape(args.model, args.block_size, args.dtype)
    sizes = PieSizes(args.pool_blocks, args.ring_slots)  # the ring follows the link

    runs = {
        "stock_equal": run_spec(args, shape, args.device_blocks, None),
        "stock_all": run_spec(args, shape, args.all_blocks, None),
    }
    for speed in args.speeds.split(","):
        keys = sizes.engine_keys(shape) | {"target_slowdown": args.target_slowdown}
        keys |= link_keys(speed)
        runs[f"pie_{speed}"] = run_spec(args, shape, args.device_blocks, keys)
    return {name: spec | {"watch_steps": True} for name, spec in runs.items()}


def add_shares(
    figures: Mapping[str, Sequence[Figures]], specs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add what loads cost as a share of the time, and how fast the link was while it loaded."""
    for name, runs in figures.items():
        for run in runs:
            run["stall_share"] = run.get("stall_seconds", 0.0) / run["seconds"]
            if specs[name]["pie"] is None:
                continue
            lost = run["stall_seconds"] + run["slowed_seconds"]
            rest = run["streaming_seconds"] - lost
            run["slowdown_share"] = lost / rest if rest > 0 else 0.0
            given = specs[name]["pie"].get("emulated_link_gbps", UNUSED_GBPS)
            busy = run["load_seconds"]
            run["bandwidth_gbps"] = run["loaded_mib"] * MIB / 1e9 / busy if busy else given


def main() -> None:
    """Run all rounds, print the comparison, write JSON and plot."""
    args = parse_arguments()
    if args.redraw:
        redraw(args.output, plot)
        return
    runs = specs(args)
    figures = run_all(runs, args.repeats)
    compare_answers(figures)
    add_shares(figures, runs)
    add_simulated(figures, runs)
    questions = [
        Question(name, "stock_equal", ASKED) for name in figures if name.startswith("pie_")
    ]
    load = Load(args.chats, args.tokens)
    title = f"Link speeds: {load.chats} chats x {load.tokens} tokens, {args.dtype}"
    setup = {"repeats": args.repeats, "specs": runs}
    publish(args.output, title, setup, questions, figures, draw=plot)


if __name__ == "__main__":
    main()

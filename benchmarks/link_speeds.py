"""Is pie never slower than stock vLLM, however slow the link is, and does it rise with the link?

The chats of `benchmarks.throughput` at equal device bytes, with the host driver's link held to each
of several speeds per direction ("none" is as fast as memory copies are), between stock vLLM with
the same device bytes and stock vLLM with memory for every chat. Beside each figure stands what the
simulator says of the same chats, see `benchmarks.real.agreement`:

    python -m benchmarks.link_speeds [--speeds 0.1,0.3,1,3,none] [--repeats 3]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.drawing import drawing
from benchmarks.harness.load import Load
from benchmarks.harness.options import parser_of, run_spec
from benchmarks.harness.report import publish
from benchmarks.harness.rounds import Figures, Question, column, in_all, run_rounds
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.harness.stats import draw_curve, spread
from benchmarks.real.agreement import add_simulated
from benchmarks.throughput import MIB, compare_answers, pie_keys, run_once

ASKED = 0.95
"""Before the ring's share of the blocks is accounted for."""


UNUSED_GBPS = 1000.0
"""Of a link without a limit over which nothing was loaded: finite, and faster than any."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("link_speeds", __doc__)
    parser.add_argument("--speeds", default="0.1,0.3,1,3,10,none", help="GB/s, comma-separated")
    parser.add_argument("--target-slowdown", type=float, default=0.01)
    return parser.parse_args()


def specs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs: two of stock vLLM, and one of pie for each speed."""
    shape = kv_shape(args.model, args.block_size, args.dtype)
    sizes = PieSizes(args.pool_blocks, args.ring_slots, None)  # the ring follows the link

    runs = {
        "stock_equal": run_spec(args, shape, args.device_blocks, None),
        "stock_all": run_spec(args, shape, args.all_blocks, None),
    }
    for speed in args.speeds.split(","):
        keys = pie_keys(shape, sizes) | {"target_slowdown": args.target_slowdown}
        if speed != "none":
            keys["emulated_link_gbps"] = float(speed)
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


def plot(path: Path, title: str, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Throughput and stall share against the link's speed, and the gaps between tokens."""
    speeds = [name for name in figures if name.startswith("pie_")]
    places = range(len(speeds))
    with drawing(path, title, (16, 4.5), 1, 3) as (left, middle, right):
        throughput = [column(figures[name], "tok_s") for name in speeds]
        left.plot(places, [spread(values).median for values in throughput], color="tab:orange")
        for place, values in zip(places, throughput, strict=True):
            left.plot([place] * len(values), values, "k.", markersize=5)
        for name, style in (("stock_equal", "--"), ("stock_all", ":")):
            if name in figures:
                level = spread(column(figures[name], "tok_s")).median
                left.axhline(level, color="tab:gray", linestyle=style, label=name)
        if all(in_all(figures[name], "simulated_tok_s") for name in speeds):
            said = [spread(column(figures[name], "simulated_tok_s")).median for name in speeds]
            left.plot(places, said, color="tab:blue", linestyle=":", label="simulated")
        left.set_ylim(bottom=0)
        left.set_ylabel("tokens/s, median; dots are runs")
        left.legend()
        stalls = [spread(column(figures[name], "stall_share")).median for name in speeds]
        middle.bar(places, [100 * share for share in stalls], color="tab:orange")
        middle.set_ylabel("stall, % of the time")
        draw_gaps(right, figures)
        for axes in (left, middle):
            axes.set_xticks(places, [name.removeprefix("pie_") for name in speeds])
            axes.set_xlabel("link, GB/s per direction")


def draw_gaps(axes: Any, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Draw the gaps between tokens: stock's, and at each speed those with pooled KV and without."""
    from matplotlib import pyplot

    speeds = [name for name in figures if name.startswith("pie_")]
    shades = pyplot.get_cmap("plasma")
    colors = {name: shades(place / len(speeds)) for place, name in enumerate(speeds)}
    for run in figures.get("stock_equal", ()):
        draw_curve(axes, run["itl_curve_ms"], "stock_equal", color="tab:gray")
    for name in speeds:
        for kind, style in (("pooled", "-"), ("resident", "--")):
            for run in figures[name]:
                points = run.get(f"itl_{kind}_curve_ms")
                if points:
                    draw_curve(axes, points, f"{name}, {kind}", color=colors[name], linestyle=style)
    axes.set_xscale("log")
    axes.set_xlabel("time between tokens, ms")
    labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # Runs share one.
    axes.legend(labels.values(), labels.keys(), fontsize=8)


def main() -> None:
    """Run all rounds, print the comparison, write JSON and plot."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = specs(args)

    def runner(name: str) -> Callable[[int], Figures]:
        return lambda index: run_once(f"{name}-{index}", runs[name])

    figures = run_rounds({name: runner(name) for name in runs}, args.repeats)
    compare_answers(figures)
    add_shares(figures, runs)
    add_simulated(figures, runs)
    for each in figures.values():
        for run in each:
            run["to_simulated"] = run["tok_s"] / run["simulated_tok_s"]
    questions = [
        Question(name, "stock_equal", ASKED) for name in figures if name.startswith("pie_")
    ]
    load = Load(args.chats, args.tokens)
    title = f"Link speeds: {load.chats} chats x {load.tokens} tokens, {args.dtype}"
    setup = {"repeats": args.repeats, "specs": runs}
    publish(args.output, title, setup, questions, figures, draw=plot)


if __name__ == "__main__":
    main()

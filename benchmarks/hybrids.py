"""Does a model whose layers differ hide more pooled blocks behind the same link than a plain one?

Two models of 48 layers, equal but for what they attend to: full attention in all layers, or in
every fourth, with sliding windows in the others. The same chats run with each, over the same
emulated link, on so few device blocks that most of the full attention's KV has to be pooled. What a
step brings over the link unnoticed is set beside what the model of a step predicts, link times
seconds of a step, and beside what the simulator says:

    python -m benchmarks.hybrids [--link 0.3] [--repeats 2]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness.drawing import COLORS, drawing
from benchmarks.harness.model import made_once
from benchmarks.harness.options import add_redraw, parser_of, run_spec
from benchmarks.harness.report import publish, redraw
from benchmarks.harness.rounds import Figures, Question, column
from benchmarks.harness.shape import DTYPE_BYTES, KvShape, PieSizes
from benchmarks.harness.stats import spread
from benchmarks.real import layered_models
from benchmarks.real.agreement import add_simulated
from benchmarks.real.fresh_process import compare_answers, run_all
from benchmarks.real.layered_models import KINDS, LAYERS, WINDOW
from benchmarks.real.step_times import Step
from pie_vllm.geometry import cdiv
from pie_vllm.simulation.traces import Profile

FOLDER = Path("build/models/layered")
ASKED = 0.9
"""Share of the predicted blocks that is asked for."""

TAILS = 48
"""Resident blocks of full attention: the last one of each chat, and prompts' chunks."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("hybrids", __doc__)
    add_redraw(parser)
    parser.add_argument("--link", type=float, default=0.3, help="GB/s in each direction")
    parser.add_argument("--target-slowdown", type=float, default=0.05)
    parser.set_defaults(block_size=32, pool_blocks=400, repeats=2)
    return parser.parse_args()


def windows(args: argparse.Namespace, kind: str) -> int:
    """Resident blocks that the windows of all chats take."""
    chats, block = int(args.chats), int(args.block_size)
    return chats * (KINDS[kind] - 1) * (WINDOW // block + 1)


def shape_of(args: argparse.Namespace, kind: str) -> KvShape:
    """Pages of a block: one in each layer of a KV cache group."""
    token = 2 * layered_models.KV_HEADS * layered_models.HEAD * DTYPE_BYTES[args.dtype]
    return KvShape(LAYERS // KINDS[kind], token * args.block_size)


def specs(args: argparse.Namespace, kind: str) -> dict[str, dict[str, Any]]:
    """The runs with one model: pie, and stock vLLM with memory for all."""
    shape = shape_of(args, kind)
    model = layered_models.made_once(kind, FOLDER / kind, made_once(args.model))
    given = argparse.Namespace(**{**vars(args), "model": model})
    context = args.tokens + 100
    full = args.chats * (context // args.block_size + 2)
    few = TAILS + windows(args, kind)
    # Pie takes its ring out of the device's bytes. It is wider than what the link brings, so that
    # the link is what bounds the pooled blocks of a step.
    ring = cdiv(args.ring_slots * args.pool_blocks // 4, shape.layers)
    sizes = PieSizes(args.pool_blocks, args.ring_slots, round(ring / (few + ring), 3))
    keys = sizes.engine_keys(shape) | {
        "target_slowdown": args.target_slowdown,
        "emulated_link_gbps": args.link,
    }
    runs = {
        f"stock_{kind}": run_spec(given, shape, full + KINDS[kind] * few, None),
        f"pie_{kind}": run_spec(given, shape, few + ring, keys),
    }
    return {name: spec | {"watch_steps": True} for name, spec in runs.items()}


def add_hidden(
    figures: dict[str, list[Figures]],
    specs: Mapping[str, Mapping[str, Any]],
    args: argparse.Namespace,
    kind: str,
) -> None:
    """Add what the settled steps of pie brought over the link, and what they were to bring."""
    settled = [_settled(run) for run in figures[f"pie_{kind}"]]
    for run in figures[f"pie_{kind}"]:
        run["pie"]["resident_blocks"] -= windows(args, kind)  # The simulator knows no windows.
        run["bandwidth_gbps"] = args.link
    add_simulated(figures, specs)
    for run, steps in zip(figures[f"pie_{kind}"], settled, strict=True):
        profile = Profile(**run["profile"])
        compute = mean(profile.step_seconds(*step[1:4]) for step in steps)
        run["row_bytes"] = run["pie"]["num_layers"] * run["pie"]["page_bytes"]
        run["blocks_hidden"] = mean(step.loads for step in steps)
        run["blocks_predicted"] = args.link * 1e9 * compute / run["row_bytes"]
        run["hidden_to_predicted"] = run["blocks_hidden"] / run["blocks_predicted"]
        run["stall_share"] = run["stall_seconds"] / run["seconds"]


def _settled(run: Figures) -> list[Step]:
    """The later half of the steps that load.

    Raises:
        SystemExit: none does; says what to change.
    """
    steps = [step for step in (Step(*one) for one in run["trace"]["steps"]) if step.loads]
    if not steps:
        sys.exit("hybrids: no step loaded anything; ask for more --chats or --tokens")
    return steps[len(steps) // 2 :]


def plot(path: Path, title: str, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Draw blocks hidden beside those predicted, and throughput as a share of stock's."""
    with drawing(path, title, (8, 3.5), 1, 2) as (left, right):
        places = range(len(KINDS))
        for offset, key, label, colour in (
            (-0.2, "blocks_hidden", "hidden", COLORS["pie"]),
            (0.2, "blocks_predicted", "predicted", "tab:gray"),
        ):
            heights = [spread(column(figures[f"pie_{kind}"], key)).median for kind in KINDS]
            left.bar([p + offset for p in places], heights, width=0.4, color=colour, label=label)
        left.set_ylabel("pooled blocks that a step reads")
        left.legend()
        for place, kind in enumerate(KINDS):
            pie, stock = (column(figures[f"{who}_{kind}"], "tok_s") for who in ("pie", "stock"))
            shares = [mine / all_ for mine, all_ in zip(pie, stock, strict=True)]
            right.bar([place], [spread(shares).median], color=COLORS["pie"])
            right.plot([place] * len(shares), shares, "k.", markersize=6)
        right.set_ylabel("tokens/s, share of stock's")
        for axes in (left, right):
            axes.set_xticks(list(places), list(KINDS))
            axes.set_ylim(bottom=0)


def main() -> None:
    """Run all rounds, print the comparison, write JSON and plot."""
    args = parse_arguments()
    if args.redraw:
        redraw(args.output, plot)
        return
    runs = {name: spec for kind in KINDS for name, spec in specs(args, kind).items()}
    figures = run_all(runs, args.repeats, "hybrids-")
    for kind in KINDS:
        own = {name: rounds for name, rounds in figures.items() if name.endswith(kind)}
        add_hidden(own, runs, args, kind)
    compare_answers(figures)
    questions = [
        Question("pie_hybrid", "pie_plain", KINDS["hybrid"] * ASKED, key="blocks_hidden"),
        *(Question(f"pie_{kind}", f"stock_{kind}", 0.0) for kind in KINDS),
    ]
    title = f"Hybrid against plain: {args.chats} chats x {args.tokens} tokens, {args.link} GB/s"
    publish(args.output, title, {"repeats": args.repeats, "specs": runs}, questions, figures, plot)


if __name__ == "__main__":
    main()

"""What do bytes loaded per token, and pie / stock, become when steps verify several tokens?

Chats that repeat what they say, with n-gram drafts of several lengths on both sides, at equal
device bytes. *Pooled* loads all pooled blocks in each step, whatever it costs: its bytes per token
are to fall by the acceptance length, which is the tokens of a request's step. Over links of several
speeds pie / stock is to be no lower than without speculation:

    python -m benchmarks.speculation [--drafts 0,1,2,3] [--speeds 0.3,1,none] [--repeats 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.drawing import COLORS, drawing
from benchmarks.harness.options import (
    add_redraw,
    add_speeds,
    link_keys,
    parser_of,
    run_spec,
    with_ngrams,
)
from benchmarks.harness.report import publish, redraw
from benchmarks.harness.rounds import Figures, Question, column
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.harness.stats import spread
from benchmarks.real.fresh_process import MIB, run_all

BYTES_ASKED = 0.4
"""Bytes per token with an acceptance length of three, as a fraction of those without drafts."""

ACCEPTANCE_ASKED = 3.0
RATIO_ASKED = 0.95
"""Pie / stock with drafts over that without: no lower, but for the scatter of a machine."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("speculation", __doc__)
    add_redraw(parser)
    parser.add_argument("--drafts", default="0,1,2,3", help="draft tokens, comma-separated")
    add_speeds(parser, "0.3,1,none")
    parser.set_defaults(repeats=2)
    return parser.parse_args()


def specs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs for each number of drafts: stock, pie over each link, and pie that pools all."""
    shape = kv_shape(args.model, args.block_size, args.dtype)
    keys = PieSizes(args.pool_blocks, args.ring_slots).engine_keys(shape)
    # A ring for the whole window, so that its width is the same with drafts and without.
    wide = {"ring_fraction": 0.3, "target_slowdown": "off"}
    sides: dict[str, dict[str, Any] | None] = {"stock": None, "pooled": keys | wide}
    for speed in filter(None, args.speeds.split(",")):
        sides[f"pie_{speed}"] = keys | link_keys(speed)
    runs = {}
    for drafts in map(int, args.drafts.split(",")):
        for side, pie in sides.items():
            spec = run_spec(args, shape, args.device_blocks, pie)
            runs[f"{side}-{drafts}"] = with_ngrams(spec, drafts)
    return runs


def add_per_token(
    figures: Mapping[str, Sequence[Figures]], specs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add bytes loaded per token, and throughput over that of stock with the same drafts."""
    for name, runs in figures.items():
        load = specs[name]["load"]
        stock = figures[f"stock-{name.partition('-')[2]}"]
        for run, beside in zip(runs, stock, strict=True):
            run.pop("tokens")
            run["to_stock"] = run["tok_s"] / beside["tok_s"]
            if "loaded_mib" in run:
                loaded = run["loaded_mib"] * MIB / 1024
                run["loaded_kib_per_token"] = loaded / (load["chats"] * load["tokens"])


def questions_of(figures: Mapping[str, Sequence[Figures]]) -> list[Question]:
    """Bytes per token of pie that pools all, and pie / stock, over those without drafts."""
    found = []
    for name, runs in figures.items():
        side, _, drafts = name.partition("-")
        if drafts == "0" or f"{side}-0" not in figures or side == "stock":
            continue
        if side == "pooled":
            accepted = spread(column(runs, "tokens_per_step")).median
            asked = BYTES_ASKED if accepted >= ACCEPTANCE_ASKED else 1.2 / accepted
            found.append(Question(name, f"{side}-0", asked, "loaded_kib_per_token", less=True))
        else:
            found.append(Question(name, f"{side}-0", RATIO_ASKED, "to_stock"))
    return found


def plot(path: Path, title: str, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Draw bytes per token, and pie / stock by the link, over the acceptance length."""
    sides = list(dict.fromkeys(name.partition("-")[0] for name in figures))
    with drawing(path, title, (8, 4), 1, 2) as (left, right):
        for side in sides:
            runs = [found for name, found in figures.items() if name.partition("-")[0] == side]
            accepted = [spread(column(found, "tokens_per_step")).median for found in runs]
            if side == "pooled":
                loaded = [spread(column(found, "loaded_kib_per_token")).median for found in runs]
                left.plot(accepted, loaded, "o-", color=COLORS["pooled"], label="measured")
                first = loaded[0] * accepted[0]
                falling = [first / length for length in accepted]
                left.plot(accepted, falling, ":", color="black", label="1 / acceptance length")
            elif side != "stock":
                ratios = [spread(column(found, "to_stock")).median for found in runs]
                speed = side.partition("_")[2]
                label = "link as fast as memory" if speed == "none" else f"link {speed} GB/s"
                right.plot(accepted, ratios, "o-", label=label)
        left.set_ylabel("KiB loaded per token")
        right.set_ylabel("throughput, pie / stock")
        for axes in (left, right):
            axes.set_xlabel("tokens of a request's step")
            axes.set_ylim(bottom=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")


def main() -> None:
    """Run all rounds, print the comparison, write JSON and plot."""
    args = parse_arguments()
    if args.redraw:
        redraw(args.output, plot)
        return
    runs = specs(args)
    figures = run_all(runs, args.repeats, prefix="speculation-")
    add_per_token(figures, runs)
    title = f"Speculation by n-grams: {args.chats} chats x {args.tokens} tokens, {args.dtype}"
    setup = {"repeats": args.repeats, "specs": runs}
    publish(args.output, title, setup, questions_of(figures), figures, draw=plot)


if __name__ == "__main__":
    main()

"""The comparison of `benchmarks.throughput` over HTTP: real servers, streaming OpenAI clients.

stock_equal     `vllm serve` with the device bytes of `--device-blocks`; preempts
stock_all       `vllm serve` with KV memory for every chat
pie_starved     `--block-manager pie` with the device bytes of stock_equal, ring included

python -m benchmarks.serving [--repeats 3] [--only stock_equal,pie_starved]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.load import Load
from benchmarks.harness.options import add_redraw, add_wide_ring, parser_of, starved_sizes
from benchmarks.harness.report import publish, redraw
from benchmarks.harness.rounds import Figures, Question, run_rounds
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.real.serving_run import Setting, run_server, server_arguments

MIB = 2**20
QUESTIONS = (
    Question("pie_starved", "stock_equal", 1.25),
    Question("pie_starved", "stock_all", 0.75),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("serving", __doc__)
    add_redraw(parser)
    add_wide_ring(parser)
    parser.add_argument("--only", default="", help="comma-separated configurations")
    return parser.parse_args()


def main() -> None:
    """Run all rounds, print the comparison, write JSON and plot."""
    args = parse_arguments()
    if args.redraw:
        redraw(args.output)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = Load(args.chats, args.tokens)
    shape = kv_shape(args.model, args.block_size, args.dtype)
    logs = Path("build/logs")
    setting = Setting(args.model, shape, args.block_size, args.dtype, 1024, args.compiled, logs)
    pie = starved_sizes(args, shape)
    sides: dict[str, tuple[int, PieSizes | None]] = {
        "stock_equal": (args.device_blocks, None),
        "pie_starved": (args.device_blocks, pie),
        "stock_all": (args.all_blocks, None),
    }
    wanted = args.only.split(",") if args.only else list(sides)

    def runner(name: str) -> Callable[[int], Figures]:
        def run(index: int) -> Figures:
            run_figures = run_server(f"{name}-{index}", setting, load, *sides[name]).figures
            figures: Figures = dict(run_figures)
            if sides[name][1] is not None:
                figures["loaded_mib"] = figures["pie_loaded_bytes"] / MIB
                figures["stored_mib"] = figures["pie_stored_bytes"] / MIB
            return figures

        return run

    figures = run_rounds({name: runner(name) for name in wanted}, args.repeats)
    setup = {
        "repeats": args.repeats,
        "arguments": {name: server_arguments(setting, *sides[name]) for name in wanted},
    }
    title = f"{load.chats} chats x {load.tokens} tokens over HTTP, {args.dtype}"
    publish(args.output, title, setup, QUESTIONS, figures)


if __name__ == "__main__":
    main()

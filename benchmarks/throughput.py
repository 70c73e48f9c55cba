"""How much throughput does pie win over stock vLLM at equal device bytes, and what does it cost?

32 chats of 300 greedy tokens in one process, every run in a fresh process, configurations
interleaved and repeated:

    stock_equal     stock vLLM with the device bytes of `--device-blocks`; preempts
    stock_all       stock vLLM with KV memory for every chat
    pie_starved     pie with the device bytes of stock_equal, ring included, and a CPU pool
    pie_resident    pie with the device bytes of stock_all and the default ring; pools nothing

    python -m benchmarks.throughput [--repeats 3] [--only stock_equal,pie_starved]
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness.load import Load
from benchmarks.harness.options import (
    add_redraw,
    add_wide_ring,
    parser_of,
    run_spec,
    starved_sizes,
)
from benchmarks.harness.report import publish, redraw
from benchmarks.harness.rounds import Question
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.real.fresh_process import compare_answers, run_all

QUESTIONS = (
    Question("pie_starved", "stock_equal", 1.25),
    Question("pie_starved", "stock_all", 0.75),
    Question("pie_resident", "stock_all", 0.98),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("throughput", __doc__)
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
    load = Load(args.chats, args.tokens)
    shape = kv_shape(args.model, args.block_size, args.dtype)
    starved = starved_sizes(args, shape)
    resident = PieSizes(args.pool_blocks, args.ring_slots)

    def spec(device_blocks: int, pie: PieSizes | None) -> dict[str, Any]:
        return run_spec(args, shape, device_blocks, pie.engine_keys(shape) if pie else None)

    specs = {
        "stock_equal": spec(args.device_blocks, None),
        "pie_starved": spec(args.device_blocks, starved),
        "stock_all": spec(args.all_blocks, None),
        "pie_resident": spec(args.all_blocks, resident),
    }
    wanted = args.only.split(",") if args.only else list(specs)
    specs = {name: specs[name] for name in wanted}
    figures = run_all(specs, args.repeats)
    compare_answers(figures)
    title = f"{load.chats} chats x {load.tokens} tokens, one process, {args.dtype}"
    setup = {"repeats": args.repeats, "specs": specs}
    publish(args.output, title, setup, QUESTIONS, figures)


if __name__ == "__main__":
    main()

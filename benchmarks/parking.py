"""What does parked KV win where requests are preempted or come back, and what does it cost?

Three loads, each on real vLLM in one process, prefix caching on for all:

    preempted   chats arrive a little faster than vLLM with memory for all can answer them, on
                a device that holds a part of those under way
    returning   chats take turns, each coming back with its history, the answer and a new
                question; all of them together have 4 times the KV of the device
    fresh       chats without any reuse, as many at a time as the device holds

    stock_equal     stock vLLM with the device bytes of `--device-blocks`
    stock_all       stock vLLM with KV memory for every chat: what can be had at most
    pie             pie with the device bytes of stock_equal, ring included, and a CPU pool

Runs of the first two loads are fresh processes, interleaved and repeated. The cost in the third is
small beside the drift of a shared machine, so there two engines, stock_equal and pie, take turns of
a few steps. Both have the same schedule, and nothing is preempted: more memory changes nothing.

    python -m benchmarks.parking [--repeats 2] [--only preempted,returning,fresh]
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from benchmarks.harness.options import add_redraw, parser_of
from benchmarks.harness.shape import kv_shape
from benchmarks.real.churn import child
from benchmarks.real.parking_loads import QUESTIONS, RUNS
from benchmarks.real.parking_report import publish_parts, redraw_parts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("parking", __doc__)
    # The smallest blocks that vLLM's attention takes on a CPU.
    parser.set_defaults(block_size=32, device_blocks=32, all_blocks=384, pool_blocks=384)
    parser.set_defaults(chats=48, repeats=2)
    add_redraw(parser)
    parser.add_argument("--only", default=",".join(RUNS), help="comma-separated loads")
    parser.add_argument(
        "--rate",
        type=float,
        help="chats a second that arrive in `preempted`; else RATE_SHARE of what stock_all "
        "answers at most, found by a run of its own",
    )
    parser.add_argument("--turns", type=int, default=3, help="of each chat in `returning`")
    parser.add_argument("--steps", type=int, default=5, help="of a turn of the engines in `fresh`")
    parser.add_argument("--ring-fraction", type=float, help="left to pie unless given")
    parser.add_argument(
        "--pie",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="a further argument of pie_vllm.engine_args; may be given again",
    )
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(RUNS)
    if unknown:
        parser.error(
            f"--only: no load is called {', '.join(sorted(unknown))}; use {', '.join(RUNS)}"
        )
    return args


def main() -> None:
    """Run the loads, print the comparison, write JSON and plot."""
    if sys.argv[1:2] == ["--serve"]:
        child(json.loads(Path(sys.argv[2]).read_text()))
        return
    args = parse_arguments()
    if args.redraw:
        redraw_parts(args.output, QUESTIONS)
        return
    # As an exception, so that the running child is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shape = kv_shape(args.model, args.block_size, args.dtype)
    parts = {name: RUNS[name](args, shape) for name in RUNS if name in args.only.split(",")}
    setup = {key: str(value) for key, value in vars(args).items()}
    publish_parts(args.output, f"Parked KV, one process, {args.dtype}", setup, parts)


if __name__ == "__main__":
    main()

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
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.options import parser_of, run_spec
from benchmarks.harness.rounds import Figures, Question, run_rounds
from benchmarks.harness.shape import KvShape, PieSizes, kv_shape
from benchmarks.real.arrivals import RATE_SHARE, SingleChats, TurnChats
from benchmarks.real.churn import child, run_churn
from benchmarks.real.parking_report import Part, publish_parts
from benchmarks.throughput import add_pie_figures, compare_answers, pie_keys, run_once

LOADS = ("preempted", "returning", "fresh")

LONGER = 2
"""Times the device blocks of the other loads that `returning` has: a step costs much before it
computes its first token, so that short prompts are no dearer to compute than to look up."""

QUESTIONS = {
    "preempted": (
        Question("pie", "stock_equal", 1.3),
        Question("pie", "stock_equal", 0.6, "latency_p99_s", less=True),
    ),
    "returning": (
        Question("pie", "stock_equal", 0.5, "ttft_p50_ms", less=True),
        Question("pie", "stock_equal", 0.3, "prefill_tokens", less=True),
    ),
    "fresh": (Question("pie", "stock_equal", 0.98),),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("parking", __doc__)
    # The smallest blocks that vLLM's attention takes on a CPU.
    parser.set_defaults(block_size=32, device_blocks=32, all_blocks=384, pool_blocks=384)
    parser.set_defaults(chats=48, repeats=2)
    parser.add_argument("--only", default=",".join(LOADS), help="comma-separated loads")
    parser.add_argument(
        "--rate",
        type=float,
        help="chats a second that arrive in `preempted`; else RATE_SHARE of what stock_all "
        "answers at most, found by a run of its own",
    )
    parser.add_argument("--turns", type=int, default=3, help="of each chat in `returning`")
    parser.add_argument("--steps", type=int, default=5, help="of a turn of the engines in `fresh`")
    parser.add_argument("--ring-fraction", type=float, default=0.15)
    parser.add_argument(
        "--pie",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="a further argument of pie_vllm.engine_args; may be given again",
    )
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(LOADS)
    if unknown:
        parser.error(f"--only: no load is called {', '.join(sorted(unknown))}; use {LOADS}")
    return args


def single_chats(name: str, args: argparse.Namespace) -> SingleChats:
    """The chats of `preempted`, which outgrow the device, or of `fresh`, which do not."""
    prompt = (48, 80)
    if name == "preempted":
        return SingleChats(args.chats, prompt, (96, 128))
    return SingleChats(2 * args.chats, prompt, (32, 32), seed=1)


def turn_chats(args: argparse.Namespace, device_blocks: int) -> TurnChats:
    """The chats of `returning`, with WORKING_SET times the device's tokens of KV together."""
    load = TurnChats(args.chats // 3, args.turns, 0, question=32, answer=16, at_once=2)
    try:
        return load.outgrowing(device_blocks * args.block_size)
    except ValueError as error:
        raise SystemExit(
            f"--chats {args.chats}: {error}; use fewer, or more --device-blocks"
        ) from error


def spec_of(
    args: argparse.Namespace,
    shape: KvShape,
    blocks: int,
    chats: SingleChats | TurnChats,
    rate: float | None = None,
    pie: bool = False,
) -> dict[str, Any]:
    """What one engine is given: `blocks` of device memory, and chats (`rate` of them a second)."""
    keys = None
    if pie:
        sizes = PieSizes(args.pool_blocks, args.ring_slots, args.ring_fraction)
        more = dict(item.split("=", 1) for item in args.pie)
        keys = pie_keys(shape, sizes) | {key: json.loads(text) for key, text in more.items()}
    spec = run_spec(args, shape, blocks, keys)
    kind = "turns" if isinstance(chats, TurnChats) else "single"
    spec["load"] = {kind: asdict(chats), "rate": rate}
    spec["llm"] |= {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 256,
        "max_model_len": max(256, chats.longest),
    }
    return spec


def interleaved(
    name: str,
    chats: SingleChats | TurnChats,
    args: argparse.Namespace,
    shape: KvShape,
    device_blocks: int,
    rate: float | None = None,
) -> dict[str, list[Figures]]:
    """Fresh processes of all three configurations, once a round; answers compared."""
    specs = {
        "stock_equal": spec_of(args, shape, device_blocks, chats, rate),
        "pie": spec_of(args, shape, device_blocks, chats, rate, pie=True),
        "stock_all": spec_of(args, shape, args.all_blocks, chats, rate),
    }

    def runner(side: str) -> Callable[[int], Figures]:
        return lambda i: run_once(f"parking-{name}-{side}-{i}", specs[side], "parking_run")

    figures = run_rounds({side: runner(side) for side in specs}, args.repeats)
    compare_answers(figures)
    return figures


def run_preempted(args: argparse.Namespace, shape: KvShape) -> Part:
    """Chats that outgrow the device."""
    chats, rate = single_chats("preempted", args), args.rate
    if rate is None:  # What stock vLLM with memory for all answers when all come at once.
        spec = spec_of(args, shape, args.all_blocks, chats)
        rate = RATE_SHARE * float(run_once("parking-rate", spec, "parking_run")["requests_s"])
    figures = interleaved("preempted", chats, args, shape, args.device_blocks, rate)
    title = f"preempted: {chats}, {rate:.2f} a second"
    return Part(title, QUESTIONS["preempted"], figures, none_again=("pie",))


def run_returning(args: argparse.Namespace, shape: KvShape) -> Part:
    """Chats that come back."""
    device_blocks = LONGER * args.device_blocks
    chats = turn_chats(args, device_blocks)
    figures = interleaved("returning", chats, args, shape, device_blocks)
    title = f"returning: {chats}; all but the first turns"
    return Part(title, QUESTIONS["returning"], figures)


def run_fresh(args: argparse.Namespace, shape: KvShape) -> Part:
    """Chats without reuse."""
    chats = single_chats("fresh", args)
    specs = {
        name: spec_of(args, shape, args.device_blocks, chats, pie=name == "pie")
        for name in ("stock_equal", "pie")
    }
    at_once = at_once_without_pool(args, chats)
    for spec in specs.values():
        spec["llm"]["max_num_seqs"] = at_once
    figures = run_churn(specs, args.steps, args.repeats)
    for run in figures["pie"]:
        add_pie_figures(run)
    title = f"fresh: {chats}, {at_once} at once"
    return Part(title, QUESTIONS["fresh"], figures)


def at_once_without_pool(args: argparse.Namespace, chats: SingleChats) -> int:
    """How many chats the resident blocks hold to their ends, beside the ring."""
    resident = int((1 - args.ring_fraction) * args.device_blocks) - 2
    each: int = -(-(chats.longest + 1) // args.block_size)
    return max(1, resident // each)


RUNS: Mapping[str, Callable[[argparse.Namespace, KvShape], Part]] = {
    "preempted": run_preempted,
    "returning": run_returning,
    "fresh": run_fresh,
}


def main() -> None:
    """Run the loads, print the comparison, write JSON and plot."""
    if sys.argv[1:2] == ["--serve"]:
        child(json.loads(Path(sys.argv[2]).read_text()))
        return
    args = parse_arguments()
    # As an exception, so that the running child is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shape = kv_shape(args.model, args.block_size, args.dtype)
    parts = {name: RUNS[name](args, shape) for name in LOADS if name in args.only.split(",")}
    setup = {key: str(value) for key, value in vars(args).items()}
    publish_parts(args.output, f"Parked KV, one process, {args.dtype}", setup, parts)


if __name__ == "__main__":
    main()

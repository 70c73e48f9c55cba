"""The three loads of `benchmarks.parking`: what each side is given, and their runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.harness.options import run_spec
from benchmarks.harness.rounds import Figures, Question, run_rounds
from benchmarks.harness.shape import KvShape, PieSizes
from benchmarks.real.arrivals import RATE_SHARE, SingleChats, TurnChats
from benchmarks.real.churn import run_churn
from benchmarks.real.fresh_process import add_pie_figures, compare_answers, run_once
from benchmarks.real.parking_report import Part
from pie_vllm.geometry import RING_FRACTION_MAX

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
        keys = sizes.engine_keys(shape) | {key: json.loads(text) for key, text in more.items()}
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
    ring = RING_FRACTION_MAX if args.ring_fraction is None else args.ring_fraction
    resident = int((1 - ring) * args.device_blocks) - 2
    each: int = -(-(chats.longest + 1) // args.block_size)
    return max(1, resident // each)


RUNS: Mapping[str, Callable[[argparse.Namespace, KvShape], Part]] = {
    "preempted": run_preempted,
    "returning": run_returning,
    "fresh": run_fresh,
}

"""What does pie cost while everything fits the device and nothing is pooled?

Two engines, stock vLLM and pie, each in a process of its own, serve the chats of
`benchmarks.throughput` with memory for all of them, and take turns of a few steps: while one runs,
the other waits. A pair of turns lasts seconds, so that the drift of a shared machine cancels. Then
the same with n-gram drafts on both sides, over chats that repeat what they say.

    python -m benchmarks.idle_cost [--steps 10] [--drafts 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.display import console, working
from benchmarks.harness.load import Load
from benchmarks.harness.machine import facts
from benchmarks.harness.options import parser_of, run_spec, with_ngrams
from benchmarks.harness.result_file import write_result
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.harness.stats import paired_ratio, percentile
from benchmarks.real.one_run import add_chats, make_llm
from benchmarks.real.side import Sides, serve, sides


def child(spec: dict[str, Any]) -> None:
    """In a child: start an engine, then run as many steps as each turn asks for."""
    llm = make_llm(spec)
    add_chats(llm, Load(**spec["load"]))
    llm.llm_engine.step()  # The prompts.

    def turn(steps: int) -> list[float] | None:
        seconds = []
        for _ in range(steps):
            if not llm.llm_engine.has_unfinished_requests():
                return None
            start = time.perf_counter()
            llm.llm_engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    serve(turn)


def compare(engines: Sides, steps: int) -> dict[str, list[list[float]]]:
    """Turns until the load ends, the order changed each time; what is left over is dropped."""
    turns: dict[str, list[list[float]]] = {name: [] for name in engines}
    names = list(engines)
    while True:
        names.reverse()
        taken = {name: engines[name].turn(steps) for name in names}
        if None in taken.values():
            return turns
        for name, seconds in taken.items():
            turns[name].append(seconds)


def idle_cost(specs: dict[str, dict[str, Any]], steps: int, suffix: str = "") -> dict[str, Any]:
    """Run both engines in turns; ratio of throughputs, of the whole time too, and median steps."""
    with sides("idle_cost", specs, suffix) as engines, working("taking turns"):
        turns = compare(engines, steps)
    total = {side: [sum(turn) for turn in found] for side, found in turns.items()}
    ratio = paired_ratio(total["stock"], total["pie"])
    each = {side: [s for turn in found for s in turn] for side, found in turns.items()}
    middle = {side: 1e3 * percentile(seconds, 50) for side, seconds in each.items()}
    whole = sum(total["stock"]) / sum(total["pie"])
    console.print(
        f"pie / stock{suffix}, {len(turns['pie'])} pairs of turns: {ratio.text(3)}; of the whole "
        f"time {whole:.3f}; median step {middle['pie']:.1f} against {middle['stock']:.1f} ms"
    )
    return {"ratio": ratio.as_dict(), "whole": whole, "step_ms": middle}


def main() -> None:
    """Compare both engines without drafts and with, print and write the ratios."""
    if sys.argv[1:2] == ["--serve"]:
        child(json.loads(Path(sys.argv[2]).read_text()))
        return
    parser = parser_of("idle_cost", __doc__)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--drafts", type=int, default=3, help="draft tokens; 0 leaves them out")
    args: argparse.Namespace = parser.parse_args()
    shape = kv_shape(args.model, args.block_size, args.dtype)
    pie = PieSizes(args.pool_blocks, args.ring_slots).engine_keys(shape)
    specs = {
        side: run_spec(args, shape, args.all_blocks, keys)
        for side, keys in (("stock", None), ("pie", pie))
    }
    found = {"machine": facts(), **idle_cost(specs, args.steps)}
    if args.drafts:
        drafting = {side: with_ngrams(spec, args.drafts) for side, spec in specs.items()}
        found["drafting"] = idle_cost(drafting, args.steps, "-drafting")
        found["drafting"]["drafts"] = args.drafts
    write_result(args.output, found)


if __name__ == "__main__":
    main()

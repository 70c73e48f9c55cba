"""What does pie cost while everything fits the device and nothing is pooled?

Two engines, stock vLLM and pie, each in a process of its own, serve the chats of
`benchmarks.throughput` with memory for all of them, and take turns of a few steps: while one runs,
the other waits. A pair of turns lasts seconds, so that the drift of a shared machine cancels.

    python -m benchmarks.idle_cost [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.display import console, working
from benchmarks.harness.environment import vllm_environment
from benchmarks.harness.load import Load
from benchmarks.harness.machine import facts, write_json
from benchmarks.harness.one_run import add_chats, make_llm
from benchmarks.harness.options import parser_of, run_spec
from benchmarks.harness.shape import PieSizes, kv_shape
from benchmarks.harness.stats import paired_ratio, percentile
from benchmarks.throughput import SCRATCH, pie_keys


def serve(spec: dict[str, Any]) -> None:
    """In a child: start an engine, then run as many steps as each line of the input says."""
    llm = make_llm(spec)
    add_chats(llm, Load(**spec["load"]))
    llm.llm_engine.step()  # The prompts.
    print("ready", file=sys.__stderr__, flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            if not llm.llm_engine.has_unfinished_requests():
                return
            start = time.perf_counter()
            llm.llm_engine.step()
            seconds.append(time.perf_counter() - start)
        print("steps", json.dumps(seconds), file=sys.__stderr__, flush=True)


class Side:
    """One engine in its process."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        SCRATCH.mkdir(parents=True, exist_ok=True)
        path = SCRATCH / f"idle-{name}.spec.json"
        path.write_text(json.dumps(spec))
        self._log = (SCRATCH / f"idle-{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.idle_cost", "--serve", str(path)],
            env=vllm_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._until("ready")

    def _until(self, word: str) -> str | None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.startswith(word):
                return line[len(word) :].strip()
            self._log.write(line)
            self._log.flush()
        return None

    def turn(self, steps: int) -> list[float]:
        """Seconds of each step; fewer steps than asked, or none, at the end of the load."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        answer = self._until("steps")
        return json.loads(answer) if answer else []

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


def compare(sides: dict[str, Side], steps: int) -> dict[str, list[list[float]]]:
    """Turns until the load ends, the order changed each time; the last one is dropped."""
    turns: dict[str, list[list[float]]] = {name: [] for name in sides}
    names = list(sides)
    while True:
        names.reverse()
        taken = {name: sides[name].turn(steps) for name in names}
        if any(len(seconds) < steps for seconds in taken.values()):
            return turns
        for name, seconds in taken.items():
            turns[name].append(seconds)


def main() -> None:
    """Run both engines in turns, print and write the ratio."""
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(Path(sys.argv[2]).read_text()))
        return
    parser = parser_of("idle_cost", __doc__)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    args: argparse.Namespace = parser.parse_args()
    shape = kv_shape(args.model, args.block_size, args.dtype)
    pie = pie_keys(shape, PieSizes(args.pool_blocks, args.ring_slots, None))
    with working("starting two engines"):
        sides = {
            name: Side(name, run_spec(args, shape, args.all_blocks, keys))
            for name, keys in (("stock", None), ("pie", pie))
        }
    with working("taking turns"):
        turns = compare(sides, args.steps)
        for side in sides.values():
            side.close()
    total = {name: [sum(turn) for turn in found] for name, found in turns.items()}
    ratio = paired_ratio(total["stock"], total["pie"])
    each = {name: [s for turn in found for s in turn] for name, found in turns.items()}
    middle = {name: 1e3 * percentile(seconds, 50) for name, seconds in each.items()}
    whole = sum(total["stock"]) / sum(total["pie"])
    console.print(
        f"pie / stock, {len(turns['pie'])} pairs of turns: {ratio.text(3)}; of the whole time "
        f"{whole:.3f}; median step {middle['pie']:.1f} against {middle['stock']:.1f} ms"
    )
    write_json(
        args.output.with_suffix(".json"),
        {"facts": facts(), "ratio": ratio.as_dict(), "whole": whole, "step_ms": middle},
    )


if __name__ == "__main__":
    main()

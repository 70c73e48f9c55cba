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
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness.display import working
from benchmarks.harness.environment import vllm_environment
from benchmarks.harness.load import Load
from benchmarks.harness.options import parser_of, run_spec
from benchmarks.harness.report import publish
from benchmarks.harness.rounds import Figures, Question, run_rounds
from benchmarks.harness.shape import KvShape, PieSizes, kv_shape, wide_ring
from benchmarks.real.side import SCRATCH

RUN_SECONDS = 1200
MIB = 2**20

QUESTIONS = (
    Question("pie_starved", "stock_equal", 1.25),
    Question("pie_starved", "stock_all", 0.75),
    Question("pie_resident", "stock_all", 0.98),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("throughput", __doc__)
    parser.add_argument("--only", default="", help="comma-separated configurations")
    return parser.parse_args()


def pie_keys(shape: KvShape, sizes: PieSizes) -> dict[str, Any]:
    """The arguments of `pie_vllm.engine_args`."""
    keys: dict[str, Any] = {"pool_gib": sizes.pool_gib(shape), "ring_slots": sizes.ring_slots}
    if sizes.ring_fraction is not None:
        keys["ring_fraction"] = sizes.ring_fraction
    return keys


def run_once(name: str, spec: dict[str, Any], module: str = "one_run") -> Figures:
    """Run one configuration in a process of its own: a module of `real`.

    Raises:
        RuntimeError: the process failed; names its log.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    ask, answer, log = (SCRATCH / f"{name}.{kind}" for kind in ("spec.json", "json", "log"))
    ask.write_text(json.dumps(spec))
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.real.{module}", str(ask), str(answer)]
    with working(name), log.open("wb") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=vllm_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
            timeout=RUN_SECONDS,
            check=False,
        )
    if done.returncode != 0 or not answer.exists():
        raise RuntimeError(f"run {name} failed with status {done.returncode}; see {log}")
    figures: Figures = json.loads(answer.read_text())
    if spec["pie"] is not None:
        add_pie_figures(figures)
    return figures


def add_pie_figures(figures: Figures) -> None:
    """Turn pie's counters of before and after the load into figures of the load alone."""
    before, after = figures.pop("pie_before"), figures["pie"]
    for key, name in (("bytes_loaded", "loaded_mib"), ("bytes_stored", "stored_mib")):
        figures[name] = (after[key] - before[key]) / MIB
    for key in ("stall_seconds", "load_seconds"):
        figures[key] = after[key] - before[key]
    figures["pie_pooled_peak"] = after["pooled_peak"]
    figures["idle_cost_blocks"] = after["idle_cost_blocks"]


def compare_answers(figures: dict[str, list[Figures]]) -> None:
    """Count, in every run, the chats that answer as in stock with memory for all.

    The tokens themselves are dropped after that: a result file is for figures.
    """
    reference = [run["tokens"] for run in figures.get("stock_all", [])][:1]
    for runs in figures.values():
        for run in runs:
            tokens = run.pop("tokens")
            if reference:
                equal = (a == b for a, b in zip(tokens, reference[0], strict=True))
                run["equal_answers"] = sum(equal)


def main() -> None:
    """Run all rounds, print the comparison, write JSON and plot."""
    args = parse_arguments()
    # As an exception, so that the running child is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = Load(args.chats, args.tokens)
    shape = kv_shape(args.model, args.block_size, args.dtype)
    starved = wide_ring(shape, args.device_blocks, args.pool_blocks, args.ring_slots)
    resident = PieSizes(args.pool_blocks, args.ring_slots, None)

    def spec(device_blocks: int, pie: PieSizes | None) -> dict[str, Any]:
        return run_spec(args, shape, device_blocks, pie_keys(shape, pie) if pie else None)

    specs = {
        "stock_equal": spec(args.device_blocks, None),
        "pie_starved": spec(args.device_blocks, starved),
        "stock_all": spec(args.all_blocks, None),
        "pie_resident": spec(args.all_blocks, resident),
    }
    wanted = args.only.split(",") if args.only else list(specs)

    def runner(name: str) -> Callable[[int], Figures]:
        return lambda index: run_once(f"{name}-{index}", specs[name])

    figures = run_rounds({name: runner(name) for name in wanted}, args.repeats)
    compare_answers(figures)
    title = f"{load.chats} chats x {load.tokens} tokens, one process, {args.dtype}"
    setup = {"repeats": args.repeats, "specs": {name: specs[name] for name in wanted}}
    publish(args.output, title, setup, QUESTIONS, figures)


if __name__ == "__main__":
    main()

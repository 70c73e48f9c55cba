"""Runs one configuration in a process of its own, and makes figures of its counters."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness.display import working
from benchmarks.harness.environment import vllm_environment
from benchmarks.harness.rounds import Figures, run_rounds
from benchmarks.real.side import SCRATCH

RUN_SECONDS_MAX = 1200
MIB = 2**20


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
            timeout=RUN_SECONDS_MAX,
            check=False,
        )
    if done.returncode != 0 or not answer.exists():
        raise RuntimeError(f"run {name} failed with status {done.returncode}; see {log}")
    figures: Figures = json.loads(answer.read_text())
    if spec["pie"] is not None:
        add_pie_figures(figures)
    return figures


def run_all(
    specs: Mapping[str, dict[str, Any]], repeats: int, prefix: str = ""
) -> dict[str, list[Figures]]:
    """Rounds of all these configurations; the prefix is that of their files' names."""
    # As an exception, so that the running child is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def runner(name: str) -> Callable[[int], Figures]:
        return lambda index: run_once(f"{prefix}{name}-{index}", specs[name])

    return run_rounds({name: runner(name) for name in specs}, repeats)


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

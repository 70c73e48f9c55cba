"""Runs a stage in a process of its own, which is ended with all its children at the limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.harness.records import collect, failed_checks
from benchmarks.gpu.harness.stages import Wanted
from benchmarks.harness.builds import ROOT
from benchmarks.harness.environment import vllm_environment

POLL_SECONDS = 1.0
LOG_TAIL = 3000
"""Characters of a failed stage's log that go into the results."""


class Options(NamedTuple):
    """What all stages share.

    Attributes:
        driver: "cuda" or "host".
        quick: small sizes.
        limit: seconds that no stage may exceed; None is each stage's own limit.
        scratch: folder for records, logs and models.
        python_path: module search path of the stages.
    """

    driver: str
    quick: bool
    limit: float | None
    scratch: Path
    python_path: str


def run_stage(
    wanted: Wanted, options: Options, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run one stage; never raises for what the stage does.

    Args:
        wanted: the stage and its parts.
        options: options of the command.
        progress: called with what there is so far, whenever the stage has reported something.

    Returns:
        What the stage reported, with `status` ("passed", "failed", "timed out" or "skipped"),
        `seconds`, `limit` and, where it failed, `error` and `log`.
    """
    name, scratch = wanted.stage.name, options.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    records, log = scratch / f"{name}.jsonl", scratch / f"{name}.log"
    records.unlink(missing_ok=True)
    limit = options.limit or wanted.stage.limit
    told = {
        "module": wanted.stage.module,
        "driver": options.driver,
        "quick": options.quick,
        "parts": wanted.parts,
        "limit": limit,
        "scratch": str(scratch),
        "records": str(records),
    }
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.harness.stage_process", json.dumps(told)],
            cwd=ROOT,
            env=stage_environment(options),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            ended = _wait(process, begin + limit, records, progress)
        finally:
            end_group(process)
    found = collect(records)
    found |= {"seconds": round(time.monotonic() - begin, 1), "limit": limit}
    return _judge(found, process.returncode if ended else None, log)


def stage_environment(options: Options) -> dict[str, str]:
    """The environment of a stage: closed to the network, caches in the scratch folder."""
    return vllm_environment(
        PYTHONPATH=options.python_path,
        VLLM_CACHE_ROOT=str(options.scratch / "vllm-cache"),
    )


def _wait(
    process: subprocess.Popen[bytes],
    deadline: float,
    records: Path,
    progress: Callable[[dict[str, Any]], None],
) -> bool:
    """Wait until the process or its time has ended; true for the process."""
    size = -1
    while True:
        try:
            process.wait(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))
            return True
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() >= deadline:
            return False
        now = records.stat().st_size if records.exists() else 0
        if now != size:
            size = now
            progress(collect(records))


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill what is left of a process that leads its own group, children and all, and reap it."""
    with contextlib.suppress(ProcessLookupError):  # All of it has ended.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _judge(found: dict[str, Any], code: int | None, log: Path) -> dict[str, Any]:
    """Add status and, where it failed, error and log."""
    wrong = failed_checks(found)
    if code is None:
        status, error = "timed out", f"killed at its limit of {found['limit']:g} s"
    elif code < 0:
        status, error = "failed", f"ended by signal {-code}"
    elif code or "error" in found:
        status, error = "failed", found.get("error", f"ended with status {code}")
    elif wrong:
        status, error = "failed", "does not hold: " + "; ".join(wrong)
    else:
        status, error = ("skipped" if "skip" in found else "passed"), ""
    found["status"] = status
    if error:
        found["error"] = error
        # Result files are committed: no paths of this machine.
        text = log.read_text(errors="replace").replace(str(ROOT), ".").replace(sys.prefix, "PYTHON")
        found["log"] = text[-LOG_TAIL:]
    return found

"""``forks.py JOBS SUITE MODES SECONDS WORK TESTS...``: modes of a suite, each after one import.

Each mode is a fork, in a session of its own, which is ended with all that it started when its
seconds are over.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import pytest
import torch

torch.set_num_threads(1)
# vLLM's tests and what they need, imported once for all forks.
import transformers  # noqa: E402, F401
import vllm.entrypoints.llm  # noqa: E402
import vllm.v1.core.sched.scheduler  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import tests.conftest  # noqa: E402
import tests.utils  # noqa: E402, F401

PR_SET_CHILD_SUBREAPER = 36
TEST_SECONDS = 180
"""Limit of a test: pie's books are checked from scratch after every step."""


def run_mode(mode: str, suite: str, work: str, tests: list[str]) -> None:
    """Run the tests in this process, which was forked for it."""
    os.setsid()
    log = os.open(f"{work}/log/{suite}-{mode}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    out, counters = f"{work}/out/{suite}-{mode}.json", f"{work}/out/{suite}-{mode}.counters"
    for path in (out, counters):
        if os.path.exists(path):
            os.remove(path)
    os.environ.update(PIE_OUT=out, PIE_E2E_LOG=counters, PIE_CORE=mode, PIE_E2E=mode)
    if mode == "stock":
        os.environ["VLLM_PLUGINS"] = "zz_pie_conformance"  # pie's own plugin is not even loaded.
    plugins = ["-p", "outcomes", *(["-p", "pie_core"] if suite == "core" else [])]
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", "-rN"]
    loops = ["-o", "asyncio_default_fixture_loop_scope=function"]
    status = pytest.main([*plugins, *options, *loops, f"--timeout={TEST_SECONDS}", *tests])
    sys.stdout.flush()
    os._exit(int(status))


def descendants(root: int) -> set[int]:
    """All processes that stem from one; orphans are children of this process."""
    parents: dict[int, int] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parents[pid] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {os.getpid()}


def end(root: int) -> None:
    """End a process, this one apart, and all that stem from it."""
    for _ in range(3):
        for pid in descendants(root):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.3)


def main() -> None:
    """Fork for each mode, as many at a time as asked for."""
    jobs, suite, modes = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
    limit, work, tests = float(sys.argv[4]), sys.argv[5], sys.argv[6:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    running: dict[int, tuple[str, float]] = {}
    while modes or running:
        while modes and len(running) < jobs:
            pid = os.fork()
            if not pid:
                run_mode(modes[0], suite, work, tests)
            running[pid] = modes.pop(0), time.monotonic()
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        running.pop(pid, None)
        if not running:
            end(os.getpid())  # Engines that lost their server would go on for ever.
        for late, (mode, since) in running.items():
            if time.monotonic() - since > limit:
                print(f"forks: {suite}, {mode}: cut after {limit:.0f} s", file=sys.stderr)
                end(late)
        if not pid:
            time.sleep(0.2)
    end(os.getpid())


main()

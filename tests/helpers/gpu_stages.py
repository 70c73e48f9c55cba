"""Stages of `benchmarks.gpu_check` that fail in every way; the part that is asked for says how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu.harness.context import Context, NotHereError


def run(context: Context) -> None:
    """Report one row, then do what the part says."""
    (part,) = context.parts
    report = context.report
    report.row("rows", part=part, number=1.0 / 3.0, infinite=float("inf"), text="a | b\nc")
    if part == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        report.fact("child", child.pid)
        time.sleep(600)
    if part == "raises":
        raise ValueError("this went wrong")
    if part == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if part == "leaves":
        raise NotHereError("not on this machine")
    report.check("what must hold", 3, "0", part != "wrong")
    report.check("what is aimed at", 3, "< 2", False, target=True)

"""Facts that every result file carries: machine, versions, date, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def bfloat16_instructions() -> bool:
    """Whether the processor multiplies bfloat16 itself; without, the model runs far slower."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def fast_dtype() -> str:
    """The dtype that the model runs fastest in here."""
    return "bfloat16" if bfloat16_instructions() else "float32"


def package_version(name: str) -> str:
    """The installed version of a distribution, or "none"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The checked-out commit, with a mark where the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def loop_rate() -> float:
    """Empty loops of Python a second on this thread's CPU time: how fast the machine is now."""
    loops = 300_000
    start = time.thread_time()
    for _ in range(loops):
        pass
    return loops / (time.thread_time() - start)


def private_bytes() -> int:
    """Memory of this process that is there now, mappings of files left out."""
    status = Path("/proc/self/status").read_text().splitlines()
    kinds = ("RssAnon:", "RssShmem:")
    return sum(1024 * int(line.split()[1]) for line in status if line.startswith(kinds))


def facts() -> dict[str, Any]:
    """What a reader needs in order to judge or repeat a measurement."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", module_name(), *sys.argv[1:]]),
        "commit": commit(),
        "cpu": cpu_model(),
        "bfloat16_instructions": bfloat16_instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("vllm", "torch", "pie-vllm")},
    }


def module_name() -> str:
    """The benchmark module that is running."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name

"""Is the CPU memory there that the other stages count on?

A virtual machine may be given its memory only as it touches it, and what is not there yet counts
as missing: so much is touched once, ahead of the stages that take it, and given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.harness.context import Context
from pie_vllm.engine.host_memory import available_host_bytes

GIB = 1 << 30
WANTED = 48 * GIB
DRY_WANTED = GIB // 4
PIECE = GIB
KEPT = 3 * GIB
"""Bytes that stay free: whoever else runs on the machine is not to be killed for memory."""

WAIT_SECONDS = 2.0
"""For memory that is on its way to the machine."""

THREADS = 8


def run(context: Context) -> None:
    """Touch the memory and give it back; report what there was before and after."""
    with contextlib.suppress(OSError):
        # Where there is too little after all, this process is the one to end.
        Path("/proc/self/oom_score_adj").write_text("1000")
    report, wanted = context.report, DRY_WANTED if context.dry else WANTED
    for line in Path("/proc/meminfo").read_text().splitlines()[:5]:
        name, _, value = line.partition(":")
        report.fact(f"/proc/meminfo {name}", value.strip())
    for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        cpus = (node / "cpulist").read_text().strip()
        report.fact(f"{node.name}: processors", cpus or "none")
        report.fact(f"{node.name}: memory", total_of(node))
    before, begin = available_host_bytes(), time.monotonic()
    touched = touch(wanted, context, PIECE if not context.dry else DRY_WANTED // 4)
    seconds = time.monotonic() - begin
    report.row(
        "CPU memory touched once",
        wanted_GiB=wanted / GIB,
        touched_GiB=touched / GIB,
        seconds=seconds,
        available_before_GiB=before / GIB,
        available_after_GiB=available_host_bytes() / GIB,
    )
    report.check("CPU memory touched, bytes", touched, f"{wanted}", touched == wanted, target=True)


def total_of(node: Path) -> str:
    """MemTotal and MemFree of a NUMA node."""
    lines = (node / "meminfo").read_text().splitlines()
    return ", ".join(" ".join(line.split()[2:]) for line in lines[:2])


def touch(
    wanted: int,
    context: Context,
    piece: int,
    available: Callable[[], int] = available_host_bytes,
    wait: float = WAIT_SECONDS,
) -> int:
    """Touch memory piece by piece while enough is left; returns how much, all given back.

    Args:
        wanted: bytes.
        context: its time ends this too.
        piece: bytes taken at a time.
        available: bytes that there are to take.
        wait: seconds until a machine that has too little counts as having no more.
    """
    held: list[mmap.mmap] = []
    try:
        while len(held) * piece < wanted and context.left > 0:
            give_up = time.monotonic() + wait
            while available() < piece + KEPT and time.monotonic() < give_up:
                time.sleep(0.05)
            if available() < piece + KEPT:
                break
            held.append(mmap.mmap(-1, piece, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            fill(held[-1], piece)
        return min(wanted, len(held) * piece)
    finally:
        for each in held:
            each.close()


def fill(memory: mmap.mmap, size: int) -> None:
    """Touch all pages by several threads."""
    first = ctypes.c_char.from_buffer(memory)
    base, part = ctypes.addressof(first), -(-size // THREADS)
    threads = [
        threading.Thread(target=ctypes.memset, args=(base + at, 1, min(part, size - at)))
        for at in range(0, size, part)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

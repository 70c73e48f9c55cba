"""What does it cost to take and give back pool memory, and what do kernels beside it see of it?"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch

from benchmarks.gpu.harness.compute import Compute, compute_of, granularity, middle
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.machine import device_free_bytes
from benchmarks.harness.stats import percentile
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.geometry import Geometry
from pie_vllm.sizing import page_table_bytes

MIB = 1 << 20
PAGE = 65536
CORES = (1, 2, 4, 8, 16)


def run(context: Context) -> None:
    """All parts."""
    compute, unit = compute_of(context.driver), granularity(context.driver)
    sizes = (4, 16) if context.quick else (64, 256)
    repeats = 2 if context.quick else 8
    for size in sizes:
        chunks = repeats + 1
        with TransferEngine(pool(size, chunks, unit), driver=context.driver, chunks=1) as engine:
            if context.wants("chunks"):
                taken = commit_and_release(engine, repeats)
                _rows(context, "engine: commit and release of chunks", size, taken, {})
            if context.wants("cores"):
                by_cores(context, engine, size, repeats)
            if context.wants("beside") and size == sizes[0]:
                beside(context, compute, engine, size, repeats)
    if context.wants("tables"):
        tables(context, unit)
    if context.wants("torch"):
        for size in sizes:
            pin_with_torch(context, size, repeats)


def pool(chunk_mib: int, chunks: int, unit: int) -> Geometry:
    """Chunks of that size; of the device hardly anything."""
    rows = chunk_mib * MIB // PAGE
    return Geometry(1, PAGE, 4, 1, 1, chunks * rows, rows, unit)


def commit_and_release(engine: TransferEngine, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds to take each of some chunks, and to give each back."""
    commits, releases = [], []
    for chunk in range(1, repeats + 1):
        begin = time.perf_counter()
        engine.commit_chunk(chunk)
        commits.append(time.perf_counter() - begin)
    for chunk in range(repeats, 0, -1):
        begin = time.perf_counter()
        engine.release_chunk(chunk)
        releases.append(time.perf_counter() - begin)
    return commits, releases


def _rows(
    context: Context,
    table: str,
    size: int,
    taken: tuple[list[float], list[float]],
    more: dict[str, Any],
) -> None:
    gib = size / 1024
    context.report.row(
        table,
        chunk_MiB=size,
        chunks=len(taken[0]),
        **more,
        commit_s_per_GiB=middle(taken[0]) / gib,
        commit_worst=max(taken[0]) / gib,
        release_s_per_GiB=middle(taken[1]) / gib,
        release_worst=max(taken[1]) / gib,
    )


def by_cores(context: Context, engine: TransferEngine, size: int, repeats: int) -> None:
    """The same with fewer cores: the engine populates with threads, half as many as cores."""
    allowed = sorted(os.sched_getaffinity(0))
    try:
        for count in (count for count in CORES if count < len(allowed)):
            if not context.has_time(10, f"commits on {count} cores and more"):
                break
            os.sched_setaffinity(0, allowed[:count])
            taken = commit_and_release(engine, repeats)
            _rows(context, "engine: the same on fewer cores", size, taken, {"cores": count})
    finally:
        os.sched_setaffinity(0, allowed)


def beside(
    context: Context, compute: Compute, engine: TransferEngine, size: int, repeats: int
) -> None:
    """How long small kernels and their submission take while a thread commits and releases."""
    tensor = torch.zeros(1024, device=compute.device)

    def loop(stop: threading.Event, least: int) -> list[float]:
        times: list[float] = []
        while len(times) < least or not stop.is_set():
            begin = time.perf_counter()
            tensor.add_(1.0)
            end = compute.mark()
            compute.seconds(end, end)
            times.append(time.perf_counter() - begin)
        return times

    with compute.on():
        loop(_set(), 100)
        alone = loop(_set(), 2000)
        stop = threading.Event()

        def commit() -> None:
            try:
                for _ in range(3):
                    commit_and_release(engine, repeats)
            finally:
                stop.set()

        thread = threading.Thread(target=commit)
        thread.start()
        together = loop(stop, 10)
        thread.join()
    for name, times in (("alone", alone), ("while chunks come and go", together)):
        context.report.row(
            "a small kernel, submitted and waited for, in microseconds",
            when=name,
            kernels=len(times),
            median=1e6 * middle(times),
            p99=1e6 * percentile(times, 99),
            most=1e6 * max(times),
            chunk_MiB=size,
        )


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def tables(context: Context, unit: int) -> None:
    """What the device's memory loses to a pool: page tables, which come after KV was sized."""
    if context.dry:
        context.report.note("no page tables on a device without one")
        return
    chunk, chunks = (16, 8) if context.quick else (256, 64)
    with TransferEngine(pool(chunk, chunks + 1, unit), driver=context.driver, chunks=1) as engine:
        before, done = device_free_bytes(), 0
        begin = time.perf_counter()
        while done < chunks and context.left > 3:
            engine.commit_chunk(done + 1)
            done += 1
        seconds = time.perf_counter() - begin
        after = device_free_bytes()
        gib = done * chunk / 1024
        taken = (before - after) / MIB
        context.report.row(
            "device memory of the pool",
            pool_GiB=gib,
            chunk_MiB=chunk,
            commit_s_per_GiB=seconds / gib,
            device_MiB=taken,
            device_MiB_per_GiB=taken / gib,
        )
        budget = page_table_bytes(int(gib * 1024) * MIB) / MIB
        name = "device memory that a pool takes, MiB"
        context.report.check(name, taken, f"<= {budget:g}", taken <= budget, target=True)


def pin_with_torch(context: Context, size: int, repeats: int) -> None:
    """`torch.empty(pin_memory=True)` of as many bytes, for comparison."""
    if context.dry:
        context.report.note("no memory to pin without a GPU")
        return
    held, times = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        held.append(torch.empty(size * MIB, dtype=torch.int8, pin_memory=True))
        times.append(time.perf_counter() - begin)
    del held
    context.report.row(
        "torch.empty(pin_memory=True)",
        MiB=size,
        allocations=len(times),
        s_per_GiB=middle(times) / (size / 1024),
        worst=max(times) / (size / 1024),
    )

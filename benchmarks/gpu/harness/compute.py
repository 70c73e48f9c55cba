"""Where a stage computes: a CUDA stream of torch's, or in a dry run this thread."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.harness.context import NotHereError
from pie_vllm.engine.native import driver_granularity
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Copy

CHUNK_BYTES_MAX = 1 << 30
"""Bytes of a chunk of the pool: Linux 6.11 to 6.13 fail to register 2 GiB and more in one piece."""


class Compute:
    """The dry run's: torch on the CPU, on the calling thread, which is the driver's stream 0.

    Attributes:
        device: device of its tensors.
        stream: what the engine takes as compute stream.
        dtype: number format of the compute.
    """

    device = torch.device("cpu")
    stream = 0
    dtype = torch.float32

    def mark(self) -> Any:
        """A point in time of the compute."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to another; waits until both are reached."""
        return float(end - start)

    def synchronize(self) -> None:
        """Wait until all is computed."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Compute on its stream in this block."""
        yield

    def pinned(self, size: int) -> torch.Tensor:
        """Page-locked bytes, which is plain memory here."""
        return torch.empty(size, dtype=torch.int8)


class CudaCompute(Compute):
    """Torch on the first CUDA device, on a stream of its own."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        """Choose the device, so that the engine finds its context.

        Raises:
            RuntimeError: no CUDA device answers torch.
        """
        if not torch.cuda.is_available():
            raise RuntimeError(
                "no CUDA device: torch.cuda.is_available() is False. Run this on a GPU machine "
                "with a CUDA build of torch, or use --driver host for a dry run of the script"
            )
        torch.cuda.set_device(0)
        self.device = torch.device("cuda", 0)
        torch.zeros(1, device=self.device)  # Makes the context.
        self.cuda_stream = new_stream()
        self.stream = int(self.cuda_stream.cuda_stream)

    def mark(self) -> Any:
        """An event on the stream."""
        event = timed_event()
        event.record(self.cuda_stream)
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """By the device's clock."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        """Wait for the whole device."""
        torch.cuda.synchronize()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Make the stream torch's current one."""
        with torch.cuda.stream(self.cuda_stream):
            yield

    def pinned(self, size: int) -> torch.Tensor:
        """Page-locked bytes."""
        return torch.empty(size, dtype=torch.int8, pin_memory=True)


_cuda: Any = torch.cuda  # Its classes are not annotated.


def new_stream(priority: int = 0) -> Any:
    """A CUDA stream of torch's; those below 0 come first."""
    return _cuda.Stream(priority=priority)


def external_stream(number: int) -> Any:
    """A stream that others made, for torch."""
    return _cuda.ExternalStream(number)


def timed_event() -> Any:
    """A CUDA event with a time."""
    return _cuda.Event(enable_timing=True)


def compute_of(driver: str) -> Compute:
    """The compute beside an engine of that driver."""
    return CudaCompute() if driver == "cuda" else Compute()


def granularity(driver: str) -> int:
    """What the driver maps in one piece; on a GPU 2 MiB.

    Raises:
        NotHereError: the engine's build or this machine lacks the driver.
    """
    try:
        return driver_granularity(driver)
    except UnsupportedError as error:
        raise NotHereError(str(error)) from error


def layer_views(engine: TransferEngine, compute: Compute) -> list[torch.Tensor]:
    """For each layer its blocks, `[block, word]`, as 64-bit integers."""
    whole, geometry = engine.arena.tensor(compute.device), engine.geometry
    views = []
    for layer in range(geometry.num_layers):
        start = geometry.page_offset(layer, 0)
        end = geometry.page_offset(layer, geometry.num_blocks)
        pages = whole[start:end].view(torch.int64)
        views.append(pages.view(geometry.num_blocks, geometry.page_bytes // 8))
    return views


def shape(
    layers: int, page_bytes: int, resident: int, pooled: int, slots: int, rows: int, unit: int
) -> Geometry:
    """A geometry whose pool is of as few chunks as may be registered in one piece each."""
    chunk_rows = max(1, min(rows, CHUNK_BYTES_MAX // (layers * page_bytes)))
    return Geometry(layers, page_bytes, resident, pooled, slots, rows, chunk_rows, unit)


def in_chunks(runs: Iterable[Copy], chunk_rows: int) -> list[Copy]:
    """The runs, those divided that cross from one chunk of the pool to the next."""
    found = []
    for run in runs:
        done = 0
        while done < run.count:
            row = run.row + done
            count = min(run.count - done, chunk_rows - row % chunk_rows)
            found.append(Copy(run.block + done, row, count))
            done += count
    return found


def middle(values: Sequence[float]) -> float:
    """The median; nan of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

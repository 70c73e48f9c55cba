"""What the transfer tests share: small geometries, plans, page contents, a latch."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import starmap
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pie_vllm.engine.step_stats import StepStats
from pie_vllm.engine.streams import row_page
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Copy, Runs, StepPlan, runs
from tests.helpers import streams
from tests.helpers.standin import load
from tests.helpers.streams import DriverStream

PAGE = mmap.PAGESIZE
"""What the host driver maps in one piece; the stand-in for libcuda does the same here."""
LATCH_SECONDS = 5.0
Pages = npt.NDArray[np.uint8]


host_only = pytest.mark.parametrize("driver", ["host"], indirect=True)
"""For what the host driver alone has, or does otherwise than CUDA."""


def inject(
    engine: TransferEngine,
    fault: str,
    *,
    direction: str = "both",
    milliseconds: float = 0.0,
    up_to: float = 0.0,
    **other: int,
) -> None:
    """Copies that come late or torn: of the host driver, or of the stand-in for libcuda."""
    if engine.arena.driver == "host":
        streams.inject(
            engine, fault, direction=direction, milliseconds=milliseconds, up_to=up_to, **other
        )
        return
    directions = {"load": 1, "store": 2, "both": 3}[direction]
    if fault == "late":
        most = max(milliseconds, up_to)
        load().delay(milliseconds, most, directions, other.get("seed", 0))
    elif fault == "torn":
        load().tear(milliseconds, directions)
    else:
        assert fault == "none"
        load().clear()


def geometry(**changes: int) -> Geometry:
    """Six layers, eight resident and four pooled blocks, a ring of two slots."""
    sizes = {
        "num_layers": 6,
        "page_bytes": 1000,
        "resident_blocks": 8,
        "pooled_blocks": 4,
        "ring_slots": 2,
        "rows": 10,
        "chunk_rows": 5,
        "granularity": PAGE,
    }
    return Geometry(**{**sizes, **changes})


def plan(
    step: int,
    *,
    stores: tuple[tuple[int, int, int], ...] = (),
    promotions: tuple[tuple[int, int, int], ...] = (),
    loads: tuple[tuple[int, int, int], ...] | None = (),
    forward: bool = True,
    **orders: bool,
) -> StepPlan:
    """A plan of (block, row, count) runs; ``orders`` are ``stores_first`` and ``after_all``."""

    def array(triples: tuple[tuple[int, int, int], ...]) -> Runs:
        return runs(starmap(Copy, triples))

    wanted = None if loads is None else array(loads)
    return StepPlan(step, array(stores), array(promotions), wanted, (), forward, **orders)


def content(geometry: Geometry, tag: int, layer: int) -> Pages:
    """Bytes of the page that block ``tag`` has in ``layer``."""
    where = np.arange(geometry.page_bytes, dtype=np.int64)
    return ((tag * 131 + layer * 29 + (where >> 3) * 7 + where) & 0xFF).astype(np.uint8)


class View:
    """Arena and pool of an engine as numpy arrays."""

    def __init__(self, engine: TransferEngine) -> None:
        self.engine = engine
        self.geometry = engine.geometry
        # Holds for the CUDA driver too: device memory of the stand-in is host memory.
        memory = (ctypes.c_uint8 * engine.arena.size).from_address(engine.arena.address)
        self.bytes: Pages = np.frombuffer(memory, dtype=np.uint8)

    def page(self, layer: int, block: int) -> Pages:
        start = self.geometry.page_offset(layer, block)
        return self.bytes[start : start + self.geometry.page_bytes]

    def row(self, row: int, layer: int) -> Pages:
        return np.frombuffer(row_page(self.engine, row, layer), dtype=np.uint8)

    def write(self, layer: int, block: int, tag: int) -> None:
        self.page(layer, block)[:] = content(self.geometry, tag, layer)

    def late_write(self, block: int, tag: int, seconds: float) -> Callable[[int], None]:
        """Compute that takes so long in each layer, and writes the block's page at its end."""

        def compute(layer: int) -> None:
            time.sleep(seconds)
            self.write(layer, block, tag)

        return compute

    def write_all(self, block: int, tag: int) -> None:
        for layer in range(self.geometry.num_layers):
            self.write(layer, block, tag)

    def write_row(self, row: int, tag: int) -> None:
        for layer in range(self.geometry.num_layers):
            self.row(row, layer)[:] = content(self.geometry, tag, layer)

    def holds(self, layer: int, block: int, tag: int) -> bool:
        return bool((self.page(layer, block) == content(self.geometry, tag, layer)).all())

    def row_holds(self, row: int, layer: int, tag: int) -> bool:
        return bool((self.row(row, layer) == content(self.geometry, tag, layer)).all())


def run_step(
    engine: TransferEngine,
    step: StepPlan,
    *,
    write: Callable[[int], Any] | None = None,
    attend: Callable[[int], Any] | None = None,
    stream: DriverStream | None = None,
) -> StepStats:
    """One gated step; ``write`` and ``attend`` run in place or on ``stream``."""

    def compute(body: Callable[[int], Any] | None, layer: int) -> None:
        if body is not None and stream is not None:
            stream.launch(lambda: body(layer))
        elif body is not None:
            body(layer)

    engine.begin_step(step, stream.id if stream else 0)
    for layer in range(engine.geometry.num_layers):
        engine.before_write(layer)
        compute(write, layer)
        engine.before_attention(layer)
        compute(attend, layer)
        engine.after_attention(layer)
    return engine.end_step()


class Latch:
    """Blocks a stream until it is opened, or for five seconds at most."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._open = threading.Event()
        self.timed_out = False

    def block(self) -> None:
        self._entered.set()
        self.timed_out = not self._open.wait(LATCH_SECONDS)

    def wait_entered(self) -> None:
        assert self._entered.wait(LATCH_SECONDS), "the stream never reached the latch"

    def open(self) -> None:
        self._open.set()


@contextmanager
def latched(stream: DriverStream) -> Iterator[Latch]:
    """A stream that stands still inside the block; entered when it does."""
    latch = Latch()
    stream.launch(latch.block)
    latch.wait_entered()
    try:
        yield latch
    finally:
        latch.open()
    assert not latch.timed_out

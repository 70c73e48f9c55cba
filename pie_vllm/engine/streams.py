"""Counters, streams and events of an engine's driver.

Calibration reads the counters. All else is for the GPU check (``benchmarks/gpu``), which times
single copies. Streams and events mean what CUDA's do, on the host driver too.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from pie_vllm.engine.native import CountersStruct
from pie_vllm.engine.transfer_engine import TransferEngine

_DIRECTIONS = {"load": 0, "store": 1}


class Counters(NamedTuple):
    """Totals of the copies that are complete, of one direction.

    Attributes:
        bytes: bytes copied.
        copies: copies made; a run of one layer is one copy.
        seconds: seconds that batches of copies took.
    """

    bytes: int
    copies: int
    seconds: float


def counters(engine: TransferEngine, direction: str) -> Counters:
    """Totals of ``"load"`` (host to device) or ``"store"`` since the engine began."""
    result = CountersStruct()
    engine.handle.call("pie_counters_of", _DIRECTIONS[direction], ctypes.byref(result))
    return Counters(result.bytes, result.copies, result.seconds)


def row_page(engine: TransferEngine, row: int, layer: int) -> Any:
    """A row's page of one layer in the host pool, as a writable ctypes array.

    Raises:
        IntegrityError: no such row or layer.
    """
    address = ctypes.c_uint64()
    engine.handle.call("pie_row_page", row, layer, ctypes.byref(address))
    array: Any = (ctypes.c_uint8 * engine.geometry.page_bytes).from_address(address.value)
    array.owner = engine
    return array


class DriverStream:
    """A queue of work that runs in order, beside the calling thread.

    Attributes:
        id: what ``begin_step`` takes as ``compute_stream``.
    """

    def __init__(self, engine: TransferEngine) -> None:
        """Start an idle stream."""
        self._engine = engine
        number = ctypes.c_uint64()
        engine.handle.call("pie_stream_create", ctypes.byref(number))
        self.id = number.value

    def copy(self, direction: str, dst: int, src: int, size: int) -> None:
        """Copy ``size`` bytes between addresses on the stream, as a ``"load"`` or ``"store"``."""
        code = _DIRECTIONS[direction]
        self._engine.handle.call("pie_copy", self.id, code, dst, src, size)

    def synchronize(self) -> None:
        """Block until all work is done.

        Raises:
            TransferError: some of it failed.
        """
        self._engine.handle.call("pie_stream_synchronize", self.id)

    def close(self) -> None:
        """Finish the work, then end the stream."""
        self._engine.handle.call("pie_stream_destroy", self.id)


class DriverEvent:
    """A mark in a stream. Stream 0 is the calling thread."""

    def __init__(self, engine: TransferEngine) -> None:
        """An event without a record."""
        self._engine = engine
        number = ctypes.c_uint64()
        engine.handle.call("pie_event_create", ctypes.byref(number))
        self.id = number.value

    def record(self, stream: DriverStream | None = None) -> None:
        """A new record, complete when the stream's work so far is."""
        self._engine.handle.call("pie_event_record", self.id, stream.id if stream else 0)

    def seconds_until(self, end: DriverEvent) -> float:
        """Seconds from this event's record to ``end``'s, both complete.

        Raises:
            TransferError: one of them is not complete.
        """
        seconds = ctypes.c_double()
        self._engine.handle.call("pie_event_elapsed", self.id, end.id, ctypes.byref(seconds))
        return seconds.value

    def close(self) -> None:
        """Forget the event; waits submitted before are not touched."""
        self._engine.handle.call("pie_event_destroy", self.id)

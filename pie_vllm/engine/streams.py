"""Streams, events, faults and counters of an engine's driver.

For tests, and for a runner that has no streams of its own. Their meaning is
CUDA's, on the host driver too: a wait means the newest record submitted before
it, and an event that was never recorded counts as complete.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from pie_vllm.engine.native import HOST_FN, CountersStruct
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError

_DIRECTIONS = {"load": 1, "store": 2, "both": 3}
_FAULTS = {"none": 0, "fail": 1, "late": 2, "torn": 3}


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
    engine.handle.call("pie_counters_of", _DIRECTIONS[direction] - 1, ctypes.byref(result))
    return Counters(result.bytes, result.copies, result.seconds)


def inject(
    engine: TransferEngine,
    fault: str,
    *,
    direction: str = "both",
    nth: int = 1,
    milliseconds: float = 0.0,
    up_to: float = 0.0,
    seed: int = 0,
) -> None:
    """Make the host driver's copies fail, come late or come in two halves.

    Args:
        engine: whose copies.
        fault: ``"fail"`` (the ``nth`` copy from now), ``"late"`` (each batch,
            that is each layer's copies, waits ``milliseconds``, or a random
            time up to ``up_to``), ``"torn"`` (each batch stops for
            ``milliseconds`` between its halves) or ``"none"`` (all back).
        direction: ``"load"``, ``"store"`` or ``"both"``.
        nth: for ``"fail"``; 1 is the next copy.
        milliseconds: for ``"late"`` and ``"torn"``.
        up_to: for ``"late"``, milliseconds.
        seed: of the random times.

    Raises:
        ConfigError: an unknown fault or direction.
    """
    if fault not in _FAULTS or direction not in _DIRECTIONS:
        raise ConfigError(
            f"unknown fault {fault!r} or direction {direction!r}; valid are "
            f"{', '.join(_FAULTS)} and {', '.join(_DIRECTIONS)}"
        )
    first = float(nth) if fault == "fail" else milliseconds
    engine.handle.call("pie_inject", _FAULTS[fault], _DIRECTIONS[direction], first, up_to, seed)


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
        self._callbacks: list[Any] = []
        number = ctypes.c_uint64()
        engine.handle.call("pie_stream_create", ctypes.byref(number))
        self.id = number.value

    def launch(self, body: Callable[[], object]) -> None:
        """Run ``body`` on the stream; it must not raise and must not call the engine."""
        callback = HOST_FN(lambda _: (body(), None)[1])
        self._callbacks.append(callback)
        self._engine.handle.call("pie_launch_host", self.id, callback, None)

    def copy(self, direction: str, dst: int, src: int, size: int) -> None:
        """Copy ``size`` bytes between addresses on the stream; direction as in ``inject``."""
        code = _DIRECTIONS[direction] - 1
        self._engine.handle.call("pie_copy", self.id, code, dst, src, size)

    def wait(self, event: DriverEvent) -> None:
        """Later work waits for the event's newest record."""
        self._engine.handle.call("pie_stream_wait", self.id, event.id)

    def synchronize(self) -> None:
        """Block until all work is done.

        Raises:
            TransferError: some of it failed.
        """
        self._engine.handle.call("pie_stream_synchronize", self.id)
        self._callbacks.clear()

    def close(self) -> None:
        """Finish the work, then end the stream."""
        self._engine.handle.call("pie_stream_destroy", self.id)
        self._callbacks.clear()


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

    def query(self) -> bool:
        """Whether the newest record is complete; true without one."""
        complete = ctypes.c_int()
        self._engine.handle.call("pie_event_query", self.id, ctypes.byref(complete))
        return bool(complete.value)

    def synchronize(self) -> None:
        """Block until the newest record is complete.

        Raises:
            TransferError: its stream had failed.
        """
        self._engine.handle.call("pie_event_synchronize", self.id)

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

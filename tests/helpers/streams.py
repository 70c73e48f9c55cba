"""What tests ask of an engine's driver beyond the product: work of the host, waits, faults.

Its functions are a library of their own (``tests/csrc/testing.cpp``), which acts on engines of
``libpie.so`` as it is shipped. Streams and events mean what CUDA's do, on the host driver too: a
wait means the newest record submitted before it, and an event that was never recorded counts as
complete.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_int, c_uint64, c_void_p
from functools import cache
from typing import Any

from pie_vllm.engine import streams
from pie_vllm.engine.native import error_of
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError
from tests.helpers.builds import interface_library

HOST_FN = ctypes.CFUNCTYPE(None, c_void_p)
"""A callback on a stream; takes the interpreter lock itself."""

_DIRECTIONS = {"load": 1, "store": 2, "both": 3}
_FAULTS = {"none": 0, "fail": 1, "late": 2, "torn": 3}
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pie_test_inject": (c_void_p, c_int, c_int, c_double, c_double, c_uint64),
    "pie_test_launch_host": (c_void_p, c_uint64, HOST_FN, c_void_p),
    "pie_test_stream_wait": (c_void_p, c_uint64, c_uint64),
    "pie_test_event_query": (c_void_p, c_uint64, POINTER(c_int)),
    "pie_test_event_synchronize": (c_void_p, c_uint64),
}


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(interface_library()))
    library.pie_last_error = library.pie_test_last_error  # type: ignore[attr-defined]
    library.pie_last_error.restype = c_char_p
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def _call(engine: TransferEngine, name: str, *arguments: Any) -> None:
    library = _library()
    code = getattr(library, name)(engine.handle.opened(), *arguments)
    if code:
        raise error_of(library, code)


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
        ConfigError: an unknown fault or direction, or times that would last for ever.
    """
    if fault not in _FAULTS or direction not in _DIRECTIONS:
        raise ConfigError(
            f"unknown fault {fault!r} or direction {direction!r}; valid are "
            f"{', '.join(_FAULTS)} and {', '.join(_DIRECTIONS)}"
        )
    first = float(nth) if fault == "fail" else milliseconds
    _call(engine, "pie_test_inject", _FAULTS[fault], _DIRECTIONS[direction], first, up_to, seed)


class DriverStream(streams.DriverStream):
    """A stream that runs work of the host, and waits for events."""

    def __init__(self, engine: TransferEngine) -> None:
        super().__init__(engine)
        self._callbacks: list[Any] = []

    def launch(self, body: Callable[[], object]) -> None:
        """Run ``body`` on the stream; it must not raise and must not call the engine."""
        callback = HOST_FN(lambda _: (body(), None)[1])
        self._callbacks.append(callback)
        _call(self._engine, "pie_test_launch_host", self.id, callback, None)

    def wait(self, event: DriverEvent) -> None:
        """Later work waits for the event's newest record."""
        _call(self._engine, "pie_test_stream_wait", self.id, event.id)

    def synchronize(self) -> None:
        """Block until all work is done; raises TransferError where some of it failed."""
        super().synchronize()
        self._callbacks.clear()

    def close(self) -> None:
        """Finish the work, then end the stream."""
        super().close()
        self._callbacks.clear()


class DriverEvent(streams.DriverEvent):
    """An event that can be asked and waited for."""

    def query(self) -> bool:
        """Whether the newest record is complete; true without one."""
        complete = c_int()
        _call(self._engine, "pie_test_event_query", self.id, ctypes.byref(complete))
        return bool(complete.value)

    def synchronize(self) -> None:
        """Block until the newest record is complete; raises TransferError where that failed."""
        _call(self._engine, "pie_test_event_synchronize", self.id)

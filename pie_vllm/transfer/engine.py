"""The transfer engine: carries out step plans, layer by layer.

One thread (the one that runs the model) makes all calls of an engine, in
program order. No call holds the interpreter lock while it works or waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from pie_vllm.errors import ConfigError, TransferError
from pie_vllm.memory.arena import DeviceArena
from pie_vllm.policy.geometry import Geometry
from pie_vllm.policy.plan import StepPlan
from pie_vllm.transfer.native import (
    DEBUG_FLAGS,
    PlanArrays,
    StatsStruct,
    error_of,
    geometry_struct,
    load_library,
)


class StepStats(NamedTuple):
    """What one step moved and waited.

    Attributes:
        step: number of the step.
        bytes_loaded: bytes host to device that the step submitted, promotions included.
        bytes_stored: bytes device to host that the step submitted.
        load_seconds: seconds that copies host to device took, of those that
            finished since the last report; with two steps in flight they may
            belong to the step before.
        store_seconds: the same, device to host.
        stall_seconds: seconds that the gates blocked this thread; 0 on an
            asynchronous compute stream, where waits do not block.
        gates: layers that passed ``before_attention``.
        copies: runs copied, all layers.
        bytes_promoted: the part of ``bytes_loaded`` that went to resident pages.
    """

    step: int
    bytes_loaded: int
    bytes_stored: int
    load_seconds: float
    store_seconds: float
    stall_seconds: float
    gates: int
    copies: int
    bytes_promoted: int = 0


class TransferEngine:
    """Arena, host pool, copy streams and the order between them.

    A step is ``begin_step``, then for every layer in order ``before_write``,
    ``before_attention``, ``after_attention``, then ``end_step``. Steps without
    a plan may run in between without any call.

    Args:
        geometry: all sizes; ``granularity`` a multiple of the driver's.
        driver: ``"host"``; ``"cuda"`` is not built in this version.
        link_bytes_per_s: emulated link speed per direction; ``None`` is as fast
            as the machine.
        debug: negative controls, words of ``native.DEBUG_FLAGS``.
        library_path: another build of the native library, for tests.

    Attributes:
        geometry: as given.
        arena: the device memory.

    Raises:
        ConfigError: an unknown debug word, or sizes that cannot work.
        UnsupportedError: the driver is not in this build.
        NativeLibraryError: the native library is missing or does not fit.
        TransferError: memory could not be had; nothing is left behind.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        driver: str = "host",
        link_bytes_per_s: float | None = None,
        debug: Iterable[str] = (),
        library_path: str | Path | None = None,
    ) -> None:
        """Reserve, map and populate all memory, and start the copy streams."""
        self._handle: int | None = None
        flags = _debug_flags(debug)
        self._library = library = load_library(library_path)
        self.geometry = geometry
        handle = ctypes.c_void_p()
        self._check(
            library.pie_open(
                ctypes.byref(geometry_struct(geometry)),
                driver.encode(),
                link_bytes_per_s or 0.0,
                flags,
                ctypes.byref(handle),
            )
        )
        self._handle = handle.value
        self._before_write = library.pie_before_write
        self._before_attention = library.pie_before_attention
        self._after_attention = library.pie_after_attention
        self._has_stores = False
        address, size = ctypes.c_uint64(), ctypes.c_int64()
        host, device = ctypes.c_int64(), ctypes.c_int64()
        self._check(library.pie_arena(self._handle, ctypes.byref(address), ctypes.byref(size)))
        self._check(library.pie_bytes(self._handle, ctypes.byref(host), ctypes.byref(device)))
        self.arena = DeviceArena(address.value, size.value, driver, self)
        self._host_bytes, self._device_bytes = host.value, device.value

    @property
    def host_bytes(self) -> int:
        """Host memory of the pool in bytes."""
        return self._host_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory of resident pages and ring in bytes, aliases counted once."""
        return self._device_bytes

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._handle is None

    @property
    def native(self) -> tuple[ctypes.CDLL, int]:
        """Library and handle, for ``pie_vllm.transfer.streams``.

        Raises:
            TransferError: the engine is closed.
        """
        return self._library, self._open()

    def begin_step(self, plan: StepPlan, compute_stream: int = 0) -> None:
        """Submit the plan's stores, and its promotions and loads of the first B layers.

        Args:
            plan: ``relabels`` and ``forward`` are not looked at. ``loads=None``
                means the loads of step ``plan.step - 1``.
            compute_stream: stream that the model runs on; 0 is the calling
                thread on the host driver.

        Raises:
            IntegrityError: a run outside its range or across a chunk, or a row
                both stored to and promoted from; nothing was submitted.
            TransferError: a step is open, or an earlier copy failed.
        """
        arrays = PlanArrays(plan)
        self._check(
            self._library.pie_begin_step(self._open(), ctypes.byref(arrays.struct), compute_stream)
        )
        self._has_stores = bool(plan.stores)

    def before_write(self, layer: int) -> None:
        """Order the layer's KV write after the stores of the same pages.

        Raises:
            TransferError: a store failed, or no step is open.
        """
        if not self._has_stores:
            return
        code = self._before_write(self._handle, layer)
        if code:
            raise error_of(self._library, code)

    def before_attention(self, layer: int) -> None:
        """Order the layer's attention after its loads and promotions, and count its gate.

        Raises:
            TransferError: a load failed, or no step is open.
        """
        code = self._before_attention(self._handle, layer)
        if code:
            raise error_of(self._library, code)

    def after_attention(self, layer: int) -> None:
        """Free the layer's ring slot and submit the loads of layer ``layer + B``.

        Raises:
            TransferError: no step is open.
        """
        code = self._after_attention(self._handle, layer)
        if code:
            raise error_of(self._library, code)

    def end_step(self) -> StepStats:
        """Close the step. Does not wait for copies; the step is closed also on an error.

        Raises:
            GateError: not every layer passed its gate once and in order.
            TransferError: a copy of this step or an earlier one failed; call
                ``abort_step`` to go on.
        """
        stats = StatsStruct()
        self._check(self._library.pie_end_step(self._open(), ctypes.byref(stats)))
        return _step_stats(stats)

    def abort_step(self) -> None:
        """End an open step early, or recover after a ``TransferError``.

        Promotions of layers not reached are still copied, so rows and resident
        pages agree with the tables; then copies drain and errors are cleared.
        After a failed copy some pages of that step hold old bytes.

        Raises:
            TransferError: the device cannot recover; only ``close`` is left.
        """
        self._check(self._library.pie_abort_step(self._open()))

    def run_idle(self, plan: StepPlan, compute_stream: int = 0) -> StepStats:
        """Stores and promotions of a step that runs no model; no ring loads, no gates.

        Later work of ``compute_stream`` comes after all of it: on the inline
        stream the call returns when all copies are complete.

        Raises:
            IntegrityError: as ``begin_step``.
            TransferError: a step is open, or a copy failed.
        """
        stats = StatsStruct()
        arrays = PlanArrays(plan)
        self._check(
            self._library.pie_run_idle(
                self._open(), ctypes.byref(arrays.struct), compute_stream, ctypes.byref(stats)
            )
        )
        return _step_stats(stats)

    def self_test(self) -> None:
        """Check alias coherence and the whole hand-over in the real memory.

        Call before the memory is used, or while the device is idle: the pages
        it uses, the rows it uses and the ring are zero afterwards. Step numbers
        start anew.

        Raises:
            TransferError: bytes came back wrong; pooled blocks must not be used.
        """
        self._check(self._library.pie_self_test(self._open()))

    def zero_ring(self) -> None:
        """Zero all ring slots; only while the device is idle, such as after warm-up."""
        self._check(self._library.pie_zero_ring(self._open()))

    def close(self) -> None:
        """Drain all streams and give all memory back; again is fine.

        Views of the arena must not be touched afterwards.
        """
        handle, self._handle = self._handle, None
        if handle is not None:
            self.arena.release()
            self._check(self._library.pie_close(handle))

    def __enter__(self) -> TransferEngine:
        """The engine itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _open(self) -> int:
        if self._handle is None:
            raise TransferError("the transfer engine is closed")
        return self._handle

    def _check(self, code: int) -> None:
        if code:
            raise error_of(self._library, code)


def _debug_flags(words: Iterable[str]) -> int:
    flags = 0
    for word in words:
        if word not in DEBUG_FLAGS:
            raise ConfigError(
                f"unknown debug word {word!r}; valid words are {', '.join(sorted(DEBUG_FLAGS))}"
            )
        flags |= DEBUG_FLAGS[word]
    return flags


def _step_stats(stats: StatsStruct) -> StepStats:
    return StepStats(*(getattr(stats, name) for name in StepStats._fields))

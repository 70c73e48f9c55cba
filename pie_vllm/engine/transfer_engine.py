"""The transfer engine: carries out step plans, layer by layer.

One thread (the one that runs the model) makes all calls of an engine, in
program order. No call holds the interpreter lock while it works or waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

from pie_vllm.engine.arena import DeviceArena
from pie_vllm.engine.graph_steps import GraphSteps
from pie_vllm.engine.handle import EngineHandle
from pie_vllm.engine.native import (
    OPTION_HEAD_FIRST,
    OPTION_OVERLAP,
    PlanArrays,
    StatsStruct,
    debug_flags,
    error_of,
    geometry_struct,
    load_library,
)
from pie_vllm.engine.step_stats import StepStats, step_stats
from pie_vllm.geometry import Geometry
from pie_vllm.plan import StepPlan


class TransferEngine:
    """Arena, host pool, copy streams and the order between them.

    A step is ``begin_step``, then for every layer in order ``before_write``,
    ``before_attention``, ``after_attention``, then ``end_step``. Steps without
    a plan may run in between without any call.

    A step may also run in a CUDA graph that holds the copies: see ``GraphSteps``.

    Args:
        geometry: all sizes; ``granularity`` is a multiple of the driver's.
        driver: ``"host"``, ``"cuda"`` (the device whose context is current on this
            thread, else the first) or ``"cuda:N"``.
        link_bytes_per_s: emulated link speed per direction; ``None`` is as fast
            as the machine.
        debug: negative controls, words of ``native.DEBUG_FLAGS``.
        chunks: number of the pool's chunks that are there from the start, at least one; ``None``
            is all.
        library_path: another build of the native library, for tests.

    Attributes:
        geometry: all sizes, as given.
        arena: the device memory.
        handle: the native engine, for other calls of the C interface.
        graphs: the steps in CUDA graphs, and their captures.

    Raises:
        ConfigError: an unknown debug word, or sizes that cannot work.
        UnsupportedError: the driver is not in this build, or this machine cannot do it.
        NativeLibraryError: the native library is missing or does not fit.
        TransferError: memory could not be had, or more is wanted at start than is free;
            nothing is left behind.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        driver: str = "host",
        link_bytes_per_s: float | None = None,
        debug: Iterable[str] = (),
        chunks: int | None = None,
        library_path: str | Path | None = None,
    ) -> None:
        """Reserve, map and populate all memory, and start the copy streams."""
        flags = debug_flags(debug)
        library = load_library(library_path)
        self.handle = EngineHandle(library)
        self.graphs = GraphSteps(self.handle)
        self.geometry = geometry
        handle = ctypes.c_void_p()
        self.handle.check(
            library.pie_open(
                ctypes.byref(geometry_struct(geometry)),
                driver.encode(),
                link_bytes_per_s or 0.0,
                flags,
                -1 if chunks is None else chunks,
                ctypes.byref(handle),
            )
        )
        self.handle.address = handle.value
        self._before_write = library.pie_before_write
        self._before_attention = library.pie_before_attention
        self._after_attention = library.pie_after_attention
        address, size = ctypes.c_uint64(), ctypes.c_int64()
        self.handle.call("pie_arena", ctypes.byref(address), ctypes.byref(size))
        self.arena = DeviceArena(address.value, size.value, driver, self)

    @property
    def host_bytes(self) -> int:
        """Host memory of the pool's chunks that are there now, in bytes."""
        return self._bytes()[0]

    @property
    def device_bytes(self) -> int:
        """Device memory of resident pages and ring in bytes, aliases counted once."""
        return self._bytes()[1]

    def _bytes(self) -> tuple[int, int]:
        host, device = ctypes.c_int64(), ctypes.c_int64()
        self.handle.call("pie_bytes", ctypes.byref(host), ctypes.byref(device))
        return host.value, device.value

    def begin_step(self, plan: StepPlan, compute_stream: int = 0, *, graph: bool = False) -> bool:
        """Submit the plan's copies of the first layer; the first gate submits what can follow.

        These are the stores of all layers, and promotions and loads of the first B layers. Of a
        plan with ``stores_first`` it submits all stores itself, and later compute comes after them:
        on the inline stream the call returns when they are complete. Promotions of a plan with
        ``promotions_first`` likewise.

        Args:
            plan: ``relabels`` and ``forward`` are not looked at. ``loads=None``
                means the loads of step ``plan.step - 1``.
            compute_stream: stream that the model runs on; 0 is the calling
                thread on the host driver and the default stream on CUDA.
            graph: the step may run in a captured graph, whose launch follows ``graphs.enter``;
                without that call it has gates like any other.

        Returns:
            Whether it fits a graph: not without ``graph`` and ``graphs.prepare``, with more runs to
            the device than tables hold, with both stores and promotions, with promotions that
            come first, or with a debug switch that graphs cannot follow.

        Raises:
            IntegrityError: a run outside its range or across a chunk, a row both stored to and
                promoted from, or runs that are no array as ``plan.Runs``; nothing was submitted.
            GateError: a graph of an earlier step did not copy all its layers; no step is open.
            TransferError: a step is open, an earlier copy failed, or a submission
                failed; the step is aborted then.
        """
        arrays, fits = PlanArrays(plan), ctypes.c_int()
        arguments = ctypes.byref(arrays.struct), compute_stream
        if graph:
            self.handle.call("pie_begin_graph_step", *arguments, ctypes.byref(fits))
        else:
            self.handle.call("pie_begin_step", *arguments)
        self.handle.writes_wait = graph or len(plan.stores) + len(plan.promotions) > 0
        return bool(fits.value)

    def before_write(self, layer: int) -> None:
        """Order the layer's KV write after stores of the same pages and copies into them.

        It is counted in steps that store or promote, and in captures.

        Raises:
            TransferError: a store failed, no step is open, or the engine is closed.
        """
        if not self.handle.writes_wait:
            return
        code = self._before_write(self.handle.address, layer)
        if code:
            raise error_of(self.handle.library, code)

    def before_attention(self, layer: int) -> None:
        """Order the layer's attention after its loads and promotions, and count its gate.

        Raises:
            TransferError: a load failed, or no step is open.
        """
        code = self._before_attention(self.handle.address, layer)
        if code:
            raise error_of(self.handle.library, code)

    def after_attention(self, layer: int) -> None:
        """Free the layer's ring slot and submit the loads of layer ``layer + B``.

        Raises:
            TransferError: no step is open.
        """
        code = self._after_attention(self.handle.address, layer)
        if code:
            raise error_of(self.handle.library, code)

    def end_step(self) -> StepStats:
        """Close the step. Does not wait for copies; the step is closed also on an error.

        A step in a graph has passed all gates, its bytes are those of the plan, and its stall
        is not measured: ``stall_step`` is -1, or that of an earlier step.

        Raises:
            GateError: not every layer passed its gate once and in order, in a step that stores
                or promotes also that of its write ahead of its attention, or the graph of an
                earlier step did not copy all its layers, which is known when its count of
                them has arrived, some steps later.
            TransferError: a copy of this step or an earlier one failed; call
                ``abort_step`` to go on.
        """
        stats = StatsStruct()
        self.handle.call("pie_end_step", ctypes.byref(stats))
        return step_stats(stats)

    def abort_step(self) -> None:
        """End an open step early, or recover after a ``TransferError``.

        Stores and promotions of layers not reached are still copied, so rows and
        resident pages agree with the tables; then copies drain and errors are cleared.
        After a failed copy some pages of that step hold old bytes. A step that
        entered a graph may have been launched or not.

        Raises:
            TransferError: the device cannot recover; only ``close`` is left.
            IntegrityError: the memory of a promotion's row is not there any more; all else is done.
            GateError: a graph of an earlier step did not copy all its layers.
        """
        self.handle.call("pie_abort_step")

    def drain(self) -> None:
        """Wait for the copies submitted so far.

        Raises:
            TransferError: one of them failed.
            GateError: a graph of an earlier step did not copy all its layers.
        """
        self.handle.call("pie_drain")

    def run_idle(self, plan: StepPlan, compute_stream: int = 0) -> StepStats:
        """Stores and promotions of a step that runs no model; no ring loads, no gates.

        Later work of ``compute_stream`` comes after all of it: on the inline
        stream the call returns when all copies are complete.

        Raises:
            IntegrityError: as ``begin_step``.
            TransferError: a step is open, or a copy failed.
        """
        arrays, stats = PlanArrays(plan), StatsStruct()
        arguments = ctypes.byref(arrays.struct), compute_stream, ctypes.byref(stats)
        self.handle.call("pie_run_idle", *arguments)
        return step_stats(stats)

    def self_test(self) -> None:
        """Check alias coherence and the whole hand-over in the real memory.

        Call before the memory is used, or while the device is idle: the pages
        it uses, the rows it uses and the ring are zero afterwards. Step numbers
        start anew.

        Raises:
            TransferError: bytes came back wrong; pooled blocks must not be used.
        """
        self.handle.call("pie_self_test")

    def zero_ring(self) -> None:
        """Zero all ring slots; only while the device is idle, such as after warm-up."""
        self.handle.call("pie_zero_ring")

    def use_gather(self, image: bytes | None, threshold_bytes: int, blocks: int = 8) -> None:
        """Have a kernel load short runs from the next step on; an error changes nothing.

        Args:
            image: machine code of ``gather.cu``, see ``pie_vllm.engine.gather``; None is the one in
                use.
            threshold_bytes: loads and promotions of fewer bytes in a layer are the kernel's where
                a step has 16 of them or more. 0 is no kernel, whatever the image.
            blocks: thread blocks of the kernel, 1 to 12; each takes an SM while it runs.

        Raises:
            UnsupportedError: the driver runs no kernels, or the image is for other devices.
            ConfigError: a size or a number that cannot work.
            TransferError: a step is open, a call failed, or the kernel copied wrong bytes when
                tried.
        """
        size = len(image or b"")
        self.handle.call("pie_use_gather", image, size, threshold_bytes, blocks)

    def submit_head_first(self, on: bool) -> None:
        """Whether ``begin_step`` submits the copies of one layer alone, which is so at start.

        Copies that the caller submits before the first gate, such as the step's inputs, then
        have at most these ahead of them in the device's copy engines. False: ``begin_step``
        submits the stores of all layers and the loads of the first B.

        Raises:
            TransferError: a step is open.
        """
        self.handle.call("pie_set_option", OPTION_HEAD_FIRST, on)

    def prefer_overlap(self, on: bool) -> None:
        """Whether batches ask a CUDA device for copies that overlap with compute; so at start.

        Raises:
            TransferError: a step is open.
        """
        self.handle.call("pie_set_option", OPTION_OVERLAP, on)

    def commit_chunk(self, chunk: int) -> None:
        """Take the memory of a chunk of the pool; one other thread may call it beside steps.

        Raises:
            TransferError: the memory cannot be had.
            ConfigError: there is no such chunk.
        """
        self.handle.call("pie_commit_chunk", chunk)

    def release_chunk(self, chunk: int) -> None:
        """Give the memory of a chunk back once the copies submitted so far are over.

        One other thread may call it beside steps. A later plan that names a row
        of the chunk is refused.

        Raises:
            ConfigError: there is no such chunk.
        """
        self.handle.call("pie_release_chunk", chunk)

    def close(self) -> None:
        """Drain all streams and give all memory back; again is fine.

        Views of the arena must not be touched afterwards, nor graphs launched.

        Raises:
            GateError: a graph of an earlier step did not copy all its layers; all is given back.
        """
        address = self.handle.close()
        if address is not None:
            self.arena.release()
            self.handle.check(self.handle.library.pie_close(address))

    def __enter__(self) -> TransferEngine:
        """The engine itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

"""A device of the stand-in for libcuda whose graphs a calling thread can compute along with.

A graph holds what is captured with it and, for each layer, two kernels, in place of its KV write
and its attention. While it is replayed the thread that launched it computes the model, and each of
these parts only while the replay stands at its kernel. So a layer finds exactly what the graph's
copies have brought by then, and the kernels tell the race check which pages the layer touches.

Outside of graphs the layers compute in the order of the same stream: it has run dry before each.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tests.helpers import cuda_on_cpu, standin
from tests.helpers.cuda_calls import Cuda
from tests.helpers.cuda_on_cpu import Touch

KERNEL = "a layer's part"
SECONDS = 60.0
"""That a replay and the model wait for each other."""


class Baton:
    """Goes from a replay to the model and back, once for each part of a layer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._standing: int | None = None
        self._broken = False

    def stand(self, place: int) -> None:
        """The replay has come to a kernel: return when the model is done there."""
        with self._changed:
            self._standing = place
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._broken or self._standing is None, SECONDS)

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Around a part of the model: the replay stands at its kernel meanwhile."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._standing == place, SECONDS):
                raise RuntimeError(f"the replay stands at {self._standing}, the model at {place}")
        yield
        with self._changed:
            self._standing = None
            self._changed.notify_all()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Around a replay: where the model fails, the replay goes on alone."""
        self._broken = False
        try:
            yield
        except BaseException:
            with self._changed:
                self._broken = True
                self._changed.notify_all()
            raise


class Device:
    """The stream of the compute, and the graphs of it.

    Attributes:
        stream: of the stand-in.
        capturing: the graph that is being captured, if any.
        without_gates: around the layers of a replay, in which on a GPU no Python runs.
    """

    def __init__(self) -> None:
        self._cuda = cuda = Cuda(standin.load())
        cuda.start()
        self.stream = cuda.stream()
        self._baton = Baton()
        self._touched: dict[int, Touch] = {}
        self._replaying = False
        self.capturing: Graph | None = None
        self.without_gates: Callable[[], AbstractContextManager[None]] = nullcontext
        self._executables: list[int] = []
        standin.load().register_kernel(KERNEL, self._run, [8], self._declare)
        module = self._module = cuda.make("cuModuleLoadData", b"any bytes")
        name = ctypes.c_char_p(KERNEL.encode())
        self._kernel = cuda.make("cuModuleGetFunction", module, name)

    def _run(self, params: Any, _grid: Any, _block: Any) -> None:
        self._baton.stand(_place(params))

    def _declare(self, params: Any, _grid: Any, _block: Any) -> None:
        touch = self._touched.get(_place(params))
        if touch is None:  # In a capture.
            return
        for page in touch.pages:
            standin.load().touch(page, touch.page_bytes, write=touch.write)

    @contextmanager
    def around(self, touch: Touch) -> Iterator[None]:
        """As ``cuda_on_cpu.Around``."""
        place = 2 * touch.layer + (not touch.write)
        if self.capturing is not None:
            self._launch(place)
            yield
        elif self._replaying:
            assert touch == self._touched[place]
            with self._baton.at(place):
                yield
        else:
            self.synchronize()
            cuda_on_cpu.tell(self.stream, touch)
            yield

    def _launch(self, place: int) -> None:
        number = ctypes.c_uint64(place)
        params = (ctypes.c_void_p * 1)(ctypes.addressof(number))
        sizes = [ctypes.c_uint(size) for size in (1, 1, 1, 1, 1, 1, 0)]
        self._cuda.do("cuLaunchKernel", self._kernel, *sizes, self.stream, params, None)

    @property
    def is_capturing(self) -> bool:
        """As CUDA says."""
        status = ctypes.c_int()
        self._cuda.do("cuStreamIsCapturing", self.stream, ctypes.byref(status))
        return status.value == 1

    @contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        """Around what is captured."""
        self._cuda.do("cuStreamBeginCapture", self.stream, ctypes.c_int(0))
        self.capturing = graph
        captured = ctypes.c_uint64()
        try:
            yield
        finally:
            self.capturing = None
            self._cuda.do("cuStreamEndCapture", self.stream, ctypes.byref(captured))
        graph.executable = self._cuda.make("cuGraphInstantiateWithFlags", captured.value, 0)
        self._cuda.do("cuGraphDestroy", captured.value)
        self._executables.append(graph.executable)

    def replay(self, graph: Graph, touched: list[Touch]) -> None:
        """Launch a graph and compute what it stands for; ``touched`` is what the layers will do."""
        self._touched = {2 * touch.layer + (not touch.write): touch for touch in touched}
        self._replaying = True
        try:
            with self._baton.replay():
                self._cuda.do("cuGraphLaunch", graph.executable, self.stream)
                with self.without_gates():
                    graph.body()
        finally:
            self._replaying = False

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._cuda.do("cuStreamSynchronize", self.stream)

    def forget_graphs(self) -> None:
        """Let go of them, before what they name ends."""
        self.synchronize()
        while self._executables:
            self._cuda.do("cuGraphExecDestroy", self._executables.pop())

    def close(self) -> None:
        """Let go of module and stream."""
        self._cuda.do("cuModuleUnload", self._module)
        self._cuda.close()


def _place(params: Any) -> int:
    return int(ctypes.cast(params[0], ctypes.POINTER(ctypes.c_uint64))[0])


class Graph:
    """In place of ``torch.cuda.CUDAGraph``.

    Attributes:
        executable: the stand-in's.
        body: computes what was captured, into the same tensors.
    """

    body: Callable[[], None]

    def __init__(self, device: Device, touched: Callable[[], list[Touch]]) -> None:
        self._device, self._touched = device, touched
        self.executable = 0

    def replay(self) -> None:
        """As torch's."""
        self._device.replay(self, self._touched())


class Model:
    """Around the model: what runs in a capture is what replays of that graph compute anew."""

    def __init__(self, model: Any, device: Device) -> None:
        self._model, self._device = model, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output, graph = self._model(*args, **kwargs), self._device.capturing
        if graph is not None:
            graph.body = lambda: output.copy_(self._model(*args, **kwargs))
        return output

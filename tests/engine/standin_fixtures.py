"""What the tests of the stand-in for libcuda share."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from typing import Any

from tests.helpers.cuda_calls import Cuda

HOST_FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
GLOBAL = 0
"""The mode of capture that torch uses."""


def violation(cuda: Cuda, pattern: str) -> None:
    """There is exactly one, and it says so."""
    found = cuda.standin.violations()
    assert len(found) == 1, found
    assert re.search(pattern, found[0]), found


def clean(cuda: Cuda) -> None:
    assert cuda.standin.violations() == []


class Gate:
    """A host function that holds a stream until the test lets it pass."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._open = threading.Event()
        self._function = HOST_FN(lambda _: self._open.wait(20) and None)
        cuda.do("cuLaunchHostFunc", stream, self._function, None)

    def open(self) -> None:
        self._open.set()


class Graphs:
    """Captures of a test; what is left is ended after it."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.made: list[int] = []
        self.callbacks: list[Any] = []

    def begin(self, stream: int, mode: int = GLOBAL) -> None:
        self.cuda.do("cuStreamBeginCapture", stream, mode)

    def end(self, stream: int) -> int:
        """The code of the end; the graph, made executable, is the newest in ``made``."""
        graph = ctypes.c_uint64()
        code = self.cuda.result("cuStreamEndCapture", stream, ctypes.byref(graph))
        assert bool(graph.value) is (code == 0)
        if code == 0:
            self.made.append(self.cuda.make("cuGraphInstantiateWithFlags", graph.value, 0))
            self.cuda.do("cuGraphDestroy", graph.value)
        return code

    def status(self, stream: int) -> int:
        found = ctypes.c_int()
        self.cuda.do("cuStreamIsCapturing", stream, ctypes.byref(found))
        return found.value

    def call(self, stream: int, body: Callable[[], object]) -> None:
        function = HOST_FN(lambda _: (body(), None)[1])
        self.callbacks.append(function)
        self.cuda.do("cuLaunchHostFunc", stream, function, None)

    def launch(self, stream: int, which: int = -1) -> None:
        self.cuda.do("cuGraphLaunch", self.made[which], stream)

    def edge(self, first: int, second: int) -> None:
        event = self.cuda.event()
        self.cuda.do("cuEventRecord", event, first)
        self.cuda.do("cuStreamWaitEvent", second, event, 0)

    def close(self) -> None:
        self.cuda.result("cuCtxSynchronize")
        for graph in self.made:
            self.cuda.result("cuGraphExecDestroy", graph)

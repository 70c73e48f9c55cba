"""The stand-in for libcuda: captured graphs run by their edges, and so does its race check."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest

from tests.engine.standin_fixtures import Gate, Graphs, clean, violation
from tests.helpers import standin as builds
from tests.helpers.cuda_calls import Cuda

NONE, ACTIVE = 0, 1
ILLEGAL_ADDRESS = 700

pytestmark = pytest.mark.skipif(builds.include_folder() is None, reason="no cuda.h")


def test_captured_work_runs_at_each_launch_only(cuda: Cuda, graphs: Graphs) -> None:
    [device], (memory, at), stream = cuda.device(), cuda.host(), cuda.stream()
    ran: list[int] = []
    assert graphs.status(stream) == NONE
    graphs.begin(stream)
    assert graphs.status(stream) == ACTIVE
    graphs.call(stream, lambda: ran.append(1))
    cuda.do("cuMemcpyHtoDAsync", device, at, 4, stream)
    cuda.do("cuMemsetD8Async", device + 4, 7, 4, stream)
    assert graphs.end(stream) == 0
    assert graphs.status(stream) == NONE
    cuda.do("cuStreamSynchronize", stream)
    assert ran == []
    for text in (b"abcd", b"efgh"):
        memory[:4] = text
        cuda.do("cuMemsetD8Async", device, 0, 8, stream)
        graphs.launch(stream)
        cuda.do("cuStreamSynchronize", stream)
        assert ctypes.string_at(device, 8) == text + b"\7" * 4
    assert ran == [1, 1]
    clean(cuda)


def test_branches_run_beside_one_another_and_by_their_edges(cuda: Cuda, graphs: Graphs) -> None:
    stream, side = cuda.stream(), cuda.stream()
    order: list[str] = []
    released = threading.Event()
    graphs.begin(stream)
    graphs.call(stream, lambda: order.append("first"))
    graphs.edge(stream, side)
    assert graphs.status(side) == ACTIVE
    graphs.call(side, lambda: (released.wait(10), order.append("side")))
    graphs.call(stream, lambda: (order.append("beside"), released.set()))
    graphs.edge(side, stream)
    graphs.call(stream, lambda: order.append("last"))
    assert graphs.end(stream) == 0
    assert graphs.status(side) == NONE
    for _ in range(2):
        order.clear()
        released.clear()
        graphs.launch(stream)
        cuda.do("cuStreamSynchronize", stream)
        assert order == ["first", "beside", "side", "last"]


def test_launches_of_a_graph_never_overlap(cuda: Cuda, graphs: Graphs) -> None:
    """On two streams; and a wait of one of these holds what follows."""
    stream, other = cuda.stream(), cuda.stream()
    running, most = [0], [0]

    def work() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.005)
        running[0] -= 1

    graphs.begin(stream)
    graphs.call(stream, work)
    assert graphs.end(stream) == 0
    gate = Gate(cuda, stream)
    for target in (stream, other, stream, other):
        graphs.launch(target)
    gate.open()
    cuda.do("cuCtxSynchronize")
    assert most == [1]


def test_arguments_of_a_kernel_are_those_captured(cuda: Cuda, graphs: Graphs) -> None:
    [device], stream, standin = cuda.device(), cuda.stream(), cuda.standin

    def address(params: Any) -> int:
        return int(ctypes.cast(params[0], ctypes.POINTER(ctypes.c_uint64)).contents.value)

    standin.register_kernel(
        "add",
        lambda params, grid, _: ctypes.memset(
            address(params), ctypes.string_at(address(params), 1)[0] + grid[0], 1
        ),
        [8],
        lambda params, *_: standin.touch(address(params), 1, write=True),
    )
    module = cuda.make("cuModuleLoadData", b"image")
    function = cuda.make("cuModuleGetFunction", module, ctypes.c_char_p(b"add"))
    parameter = ctypes.c_uint64(device)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
    graphs.begin(stream)
    cuda.do("cuLaunchKernel", function, 3, 1, 1, 32, 1, 1, 0, stream, parameters, None)
    assert graphs.end(stream) == 0
    parameter.value = 0
    cuda.do("cuMemsetD8Async", device, 0, 1, stream)
    for _ in range(3):
        graphs.launch(stream)
    cuda.do("cuStreamSynchronize", stream)
    assert ctypes.string_at(device, 1) == b"\x09"
    clean(cuda)
    other = cuda.stream()
    cuda.do("cuMemsetD8Async", device, 0, 1, other)
    graphs.launch(stream)
    violation(
        cuda, "cuMemsetD8Async writes .*; unordered with it|cuLaunchKernel writes .* on branch"
    )
    cuda.do("cuCtxSynchronize")
    cuda.do("cuModuleUnload", module)


# The race check at a replay.


@pytest.mark.parametrize("ordered", [True, False])
def test_accesses_of_branches_are_ordered_by_edges_alone(
    cuda: Cuda, graphs: Graphs, ordered: bool
) -> None:
    [device], stream, side = cuda.device(), cuda.stream(), cuda.stream()
    graphs.begin(stream)
    graphs.edge(stream, side)
    cuda.do("cuMemsetD8Async", device, 1, 8, side)
    if ordered:
        graphs.edge(side, stream)
    cuda.standin.access(stream, device, 8, write=False)
    if not ordered:
        graphs.edge(side, stream)
    assert graphs.end(stream) == 0
    clean(cuda)  # Nothing has run.
    graphs.launch(stream)
    if ordered:
        graphs.launch(stream)
        clean(cuda)
    else:
        violation(
            cuda, "cuMemsetD8Async writes .* on branch 1 of graph .*compute reads .* branch 0"
        )


def test_a_launch_comes_after_and_before_its_streams_other_work(cuda: Cuda, graphs: Graphs) -> None:
    [device], stream, side = cuda.device(), cuda.stream(), cuda.stream()
    other = cuda.stream()
    graphs.begin(stream)
    graphs.edge(stream, side)
    cuda.do("cuMemsetD8Async", device, 1, 8, side)
    graphs.edge(side, stream)
    assert graphs.end(stream) == 0
    cuda.do("cuMemsetD8Async", device, 2, 8, stream)
    graphs.launch(stream)
    cuda.do("cuMemsetD8Async", device, 3, 8, stream)
    graphs.launch(stream)
    graphs.edge(stream, other)
    cuda.do("cuMemsetD8Async", device, 4, 8, other)
    clean(cuda)
    graphs.launch(stream)
    violation(cuda, "unordered alias access")


def test_memory_that_went_before_a_replay(cuda: Cuda, graphs: Graphs) -> None:
    stream = cuda.stream()
    memory = cuda.make("cuMemAlloc", 100)
    graphs.begin(stream)
    cuda.do("cuMemsetD8Async", memory, 0, 100, stream)
    assert graphs.end(stream) == 0
    cuda.do("cuMemFree", memory)
    graphs.launch(stream)
    assert cuda.result("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS
    assert "before the work ran" in cuda.standin.violations()[0]

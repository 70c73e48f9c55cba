"""The stand-in for libcuda: stream capture, and what it forbids."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.standin_fixtures import GLOBAL, HOST_FN, Graphs
from tests.helpers import standin as builds
from tests.helpers.cuda_calls import Cuda

THREAD_LOCAL, RELAXED = 1, 2
NONE, ACTIVE, INVALIDATED_STATUS = 0, 1, 2
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_STATE, ILLEGAL_ADDRESS = 1, 2, 401, 700
UNSUPPORTED, INVALIDATED, MERGE, UNMATCHED, UNJOINED, ISOLATION = 900, 901, 902, 903, 904, 905
CAPTURED_EVENT, WRONG_THREAD = 907, 908

pytestmark = pytest.mark.skipif(builds.include_folder() is None, reason="no cuda.h")


def test_a_batch_cannot_be_captured_and_does_no_harm(cuda: Cuda, graphs: Graphs) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    graphs.begin(stream)
    assert cuda.batch(stream, [(device, at, 8)]) == UNSUPPORTED
    assert graphs.end(stream) == 0


UNSAFE: list[Callable[[Cuda], tuple[Any, ...]]] = [
    lambda _: ("cuCtxSynchronize",),
    lambda cuda: ("cuEventQuery", cuda.event()),
    lambda cuda: ("cuEventSynchronize", cuda.event()),
    lambda cuda: ("cuStreamSynchronize", cuda.stream()),
    lambda cuda: ("cuStreamQuery", cuda.stream()),
    lambda _: ("cuMemAlloc", ctypes.byref(ctypes.c_uint64()), 8),
    lambda _: ("cuModuleLoadData", ctypes.byref(ctypes.c_uint64()), b"image"),
]


@pytest.mark.parametrize("call", UNSAFE[:5])
def test_a_relaxed_capture_allows_calls_on_other_streams(
    cuda: Cuda, graphs: Graphs, call: Callable[[Cuda], tuple[Any, ...]]
) -> None:
    stream = cuda.stream()
    graphs.begin(stream, RELAXED)
    cuda.do(*call(cuda))
    assert graphs.end(stream) == 0


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *[(mode, call) for mode in (GLOBAL, THREAD_LOCAL) for call in UNSAFE],
        *[(RELAXED, name) for name in ("cuStreamSynchronize", "cuStreamQuery")],
    ],
)
def test_forbidden_calls_break_the_capture(
    cuda: Cuda, graphs: Graphs, name: str | Callable[[Cuda], tuple[Any, ...]], mode: int
) -> None:
    stream = cuda.stream()
    call = (name, stream) if isinstance(name, str) else name(cuda)
    graphs.begin(stream, mode)
    assert cuda.result(*call) == UNSUPPORTED
    assert graphs.status(stream) == INVALIDATED_STATUS
    assert cuda.result("cuLaunchHostFunc", stream, HOST_FN(lambda _: None), None) == INVALIDATED
    assert graphs.end(stream) == INVALIDATED
    assert graphs.status(stream) == NONE
    cuda.do("cuStreamSynchronize", stream)


def test_other_threads_under_a_capture(cuda: Cuda, graphs: Graphs) -> None:
    """Both modes: the whole process, and one thread."""
    stream, codes = cuda.stream(), []
    context = cuda.make("cuCtxGetCurrent")
    event = cuda.event()

    def ask() -> None:
        cuda.do("cuCtxSetCurrent", context)
        codes.append(cuda.result("cuEventQuery", event))
        graph = ctypes.c_uint64()
        codes.append(cuda.result("cuStreamEndCapture", stream, ctypes.byref(graph)))

    for mode, code in ((THREAD_LOCAL, 0), (GLOBAL, UNSUPPORTED)):
        graphs.begin(stream, mode)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert codes == [code, WRONG_THREAD]
        codes.clear()
        assert graphs.end(stream) == (INVALIDATED if code else 0)


def test_captured_events_mean_nothing_outside(cuda: Cuda, graphs: Graphs) -> None:
    stream, other, event = cuda.stream(), cuda.stream(), cuda.event(0)
    graphs.begin(stream, RELAXED)
    cuda.do("cuEventRecord", event, stream)
    for name in ("cuEventQuery", "cuEventSynchronize"):
        assert cuda.result(name, event) == CAPTURED_EVENT
    assert graphs.end(stream) == 0
    assert cuda.result("cuEventQuery", event) == CAPTURED_EVENT
    elapsed = ctypes.c_float()
    assert cuda.result("cuEventElapsedTime", ctypes.byref(elapsed), event, event) == CAPTURED_EVENT
    assert cuda.result("cuStreamWaitEvent", other, event, 0) == CAPTURED_EVENT
    cuda.do("cuEventRecord", event, other)
    cuda.do("cuEventSynchronize", event)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_capture_cannot_wait_for_work_outside(cuda: Cuda, graphs: Graphs, recorded: bool) -> None:
    stream, other, event = cuda.stream(), cuda.stream(), cuda.event()
    if recorded:
        cuda.do("cuEventRecord", event, other)
    graphs.begin(stream)
    assert cuda.result("cuStreamWaitEvent", stream, event, 0) == ISOLATION
    assert graphs.end(stream) == INVALIDATED


def test_two_captures_do_not_mix(cuda: Cuda, graphs: Graphs) -> None:
    stream, other, event = cuda.stream(), cuda.stream(), cuda.event()
    graphs.begin(stream)
    graphs.begin(other)
    cuda.do("cuEventRecord", event, stream)
    assert cuda.result("cuStreamWaitEvent", other, event, 0) == MERGE
    assert graphs.end(stream) == INVALIDATED
    assert graphs.end(other) == INVALIDATED


def test_a_branch_must_be_joined(cuda: Cuda, graphs: Graphs) -> None:
    stream, side = cuda.stream(), cuda.stream()
    graphs.begin(stream)
    graphs.edge(stream, side)
    graphs.call(side, lambda: None)
    graph = ctypes.c_uint64()
    assert cuda.result("cuStreamEndCapture", side, ctypes.byref(graph)) == UNMATCHED
    assert graphs.end(stream) == UNJOINED
    assert graphs.status(side) == NONE


def test_beginnings_and_ends_that_do_not_fit(cuda: Cuda, graphs: Graphs) -> None:
    stream, graph = cuda.stream(), ctypes.c_uint64()
    assert cuda.result("cuStreamBeginCapture", 0, GLOBAL) == UNSUPPORTED
    assert cuda.result("cuStreamEndCapture", stream, ctypes.byref(graph)) == ILLEGAL_STATE
    graphs.begin(stream)
    assert cuda.result("cuStreamBeginCapture", stream, GLOBAL) == ILLEGAL_STATE
    assert graphs.end(stream) == 0
    graphs.begin(stream)
    assert cuda.result("cuGraphLaunch", graphs.made[0], stream) == UNSUPPORTED
    assert graphs.end(stream) == 0


def test_faults_of_the_new_calls(cuda: Cuda, graphs: Graphs) -> None:
    stream, graph = cuda.stream(), ctypes.c_uint64()
    cuda.standin.fail("cuStreamBeginCapture", error=OUT_OF_MEMORY)
    assert cuda.result("cuStreamBeginCapture", stream, GLOBAL) == OUT_OF_MEMORY
    graphs.begin(stream)
    cuda.standin.fail("cuStreamIsCapturing", error=OUT_OF_MEMORY)
    status = ctypes.c_int()
    assert cuda.result("cuStreamIsCapturing", stream, ctypes.byref(status)) == OUT_OF_MEMORY
    cuda.standin.fail("cuStreamEndCapture", error=OUT_OF_MEMORY)
    assert cuda.result("cuStreamEndCapture", stream, ctypes.byref(graph)) == OUT_OF_MEMORY
    assert graphs.end(stream) == 0
    cuda.standin.fail("cuGraphLaunch", error=OUT_OF_MEMORY)
    assert cuda.result("cuGraphLaunch", graphs.made[0], stream) == OUT_OF_MEMORY
    graphs.launch(stream)
    assert [line.split()[0] for line in cuda.standin.live() if "graph" in line] == ["executable"]

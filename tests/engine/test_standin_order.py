"""The stand-in for libcuda: order of accesses, and life times."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import pytest

from tests.engine.standin_fixtures import Gate, clean, violation
from tests.helpers import standin as builds
from tests.helpers.cuda_calls import ANY, DURING_CALL, MIB, Cuda
from tests.helpers.standin import HOST

INVALID_VALUE, OUT_OF_MEMORY, NOT_READY = 1, 2, 600
ILLEGAL_ADDRESS, NOT_SUPPORTED = 700, 801

pytestmark = pytest.mark.skipif(builds.include_folder() is None, reason="no cuda.h")


# Order of accesses.


def test_unordered_write_through_another_alias(cuda: Cuda) -> None:
    [first, second], (_, at) = cuda.device(aliases=2), cuda.host()
    one, other = cuda.stream(), cuda.stream()
    assert cuda.batch(one, [(first, at, 1000)]) == 0
    assert cuda.batch(other, [(second + 1000, at + 1000, 1000)]) == 0  # a neighbour
    clean(cuda)
    assert cuda.batch(other, [(second + 500, at + 4000, 1000)]) == 0
    violation(
        cuda,
        f"unordered alias access: cuMemcpyBatchAsync writes .{first:#x}, .1000. on stream {one:#x};"
        f".*writes .{second + 500:#x}, .1000. on stream {other:#x}",
    )


def test_unordered_read_of_host_memory(cuda: Cuda) -> None:
    [device], (_, at) = cuda.device(), cuda.host()
    load, store = cuda.stream(), cuda.stream()
    assert cuda.batch(load, [(device, at, 1000)]) == 0
    assert cuda.batch(store, [(at + 999, device + MIB, 1000)]) == 0
    violation(cuda, "reads .* on stream .*writes .* on stream")


def order_by_event(cuda: Cuda, first: int, second: int) -> None:
    event = cuda.event()
    cuda.do("cuEventRecord", event, first)
    cuda.do("cuStreamWaitEvent", second, event, 0)


def order_by_synchronise(cuda: Cuda, first: int, _: int) -> None:
    cuda.do("cuStreamSynchronize", first)


def order_by_context(cuda: Cuda, *_: int) -> None:
    cuda.do("cuCtxSynchronize")


def order_by_query(cuda: Cuda, first: int, _: int) -> None:
    while cuda.result("cuStreamQuery", first) == NOT_READY:
        time.sleep(0.001)


def order_by_null_stream(cuda: Cuda, first: int, second: int) -> None:
    order_by_event(cuda, first, 0)
    order_by_event(cuda, 0, second)


def order_by_host_event(cuda: Cuda, first: int, _: int) -> None:
    event = cuda.event()
    cuda.do("cuEventRecord", event, first)
    cuda.do("cuEventSynchronize", event)


@pytest.mark.parametrize(
    "order",
    [
        order_by_event,
        order_by_synchronise,
        order_by_context,
        order_by_query,
        order_by_null_stream,
        order_by_host_event,
    ],
)
def test_what_orders_accesses(cuda: Cuda, order: Callable[[Cuda, int, int], None]) -> None:
    [first, second], (_, at) = cuda.device(aliases=2), cuda.host()
    one, other = cuda.stream(), cuda.stream()
    for _ in range(3):
        assert cuda.batch(one, [(first, at, 1000)]) == 0
        order(cuda, one, other)
        assert cuda.batch(other, [(second, at, 1000)]) == 0
        order(cuda, other, one)
    clean(cuda)


def test_a_wait_for_an_older_record_orders_nothing(cuda: Cuda) -> None:
    [device], (_, at) = cuda.device(), cuda.host()
    one, other, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda.do("cuEventRecord", event, one)
    assert cuda.batch(one, [(device, at, 8)]) == 0
    cuda.do("cuStreamWaitEvent", other, event, 0)
    assert cuda.batch(other, [(device, at, 8)]) == 0
    violation(cuda, "unordered alias access")


def test_compute_on_the_null_stream(cuda: Cuda) -> None:
    [device], (_, at), copies, done = cuda.device(), cuda.host(), cuda.stream(), cuda.event()
    standin = cuda.standin
    assert standin.access(0, device, 4096, write=True) == 0
    cuda.do("cuEventRecord", done, 0)
    cuda.do("cuStreamWaitEvent", copies, done, 0)
    assert cuda.batch(copies, [(at, device, 4096)]) == 0
    assert standin.access(0, device, 4096, write=False) == 0
    clean(cuda)
    # To CUDA the NULL stream's work is not over when the call returns.
    assert standin.access(0, device, 4096, write=True) == 0
    violation(cuda, "reads .* on stream .*compute writes .* on the NULL stream")


def test_the_host_thread_and_hand_overs(cuda: Cuda) -> None:
    (_, at), stream, [device] = cuda.host(), cuda.stream(), cuda.device()
    standin = cuda.standin

    def write() -> None:
        standin.host_fence()
        standin.access(HOST, at, 100, write=True)
        standin.host_fence()

    def other_thread() -> None:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    other_thread()
    standin.host_fence()
    assert cuda.batch(stream, [(device, at, 100)]) == 0
    clean(cuda)
    other_thread()  # while the copy may still read
    violation(cuda, "compute writes .* on thread")


def test_copies_of_a_batch_are_unordered(cuda: Cuda) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    assert cuda.batch(stream, [(device, at, 1000), (device + 999, at + 1000, 1000)]) == 0
    violation(cuda, "unordered alias access")


@pytest.mark.parametrize("order", [DURING_CALL, ANY])
def test_sources_that_are_read_early(cuda: Cuda, order: int) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    assert cuda.batch(stream, [(at, device, 8)]) == 0
    assert cuda.batch(stream, [(device, at, 8)], order) == 0  # of what the stream still writes
    violation(cuda, "unordered alias access")
    cuda.do("cuCtxSynchronize")
    assert cuda.batch(stream, [(device, at, 8)], order) == 0
    cuda.standin.access(HOST, at, 8, write=True)  # fine only when the source was read in the call
    assert len(cuda.standin.violations()) == (1 if order == DURING_CALL else 2)


def test_memory_that_comes_back_has_no_past(cuda: Cuda) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    cuda.standin.access(0, at, 8, write=True)
    cuda.do("cuCtxSynchronize")
    cuda.end("cuMemHostUnregister", at)
    cuda.do("cuMemHostRegister", at, MIB, 0)
    assert cuda.batch(stream, [(device, at, 8)]) == 0
    cuda.do("cuCtxSynchronize")
    cuda.do("cuMemHostUnregister", at)
    clean(cuda)


# Life times.


@pytest.mark.parametrize("what", ["cuMemHostUnregister", "cuMemUnmap"])
def test_memory_taken_away_under_work(cuda: Cuda, what: str) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    gate = Gate(cuda, stream)
    assert cuda.batch(stream, [(device, at, 8)]) == 0
    cuda.end(what, *((at,) if "Host" in what else (device, 2 * MIB)))
    violation(cuda, f"{what}: .* may still be used by work on stream")
    gate.open()
    assert cuda.result("cuStreamSynchronize", stream) == ILLEGAL_ADDRESS
    assert "before the work ran" in cuda.standin.violations()[1]


def test_free_under_work_that_is_over_but_not_waited_for(cuda: Cuda) -> None:
    memory, stream = cuda.make("cuMemAlloc", 100), cuda.stream()
    cuda.do("cuMemsetD8Async", memory, 0, 100, stream)
    time.sleep(0.02)
    cuda.do("cuMemFree", memory)
    violation(cuda, "cuMemFree: .* may still be used")


def test_free_after_a_wait_on_another_stream(cuda: Cuda) -> None:
    memory, one, other = cuda.make("cuMemAlloc", 100), cuda.stream(), cuda.stream()
    cuda.do("cuMemsetD8Async", memory, 7, 100, one)
    order_by_event(cuda, one, other)
    cuda.do("cuStreamSynchronize", other)
    assert ctypes.string_at(memory, 100) == b"\7" * 100
    cuda.do("cuMemFree", memory)
    clean(cuda)


def test_live_names_everything(cuda: Cuda) -> None:
    cuda.device()
    cuda.host()
    cuda.stream()
    cuda.event()
    words = [line.split()[0] for line in cuda.standin.live()]
    assert words == [
        "reservation",
        "mapping",
        "handle",
        "registration",
        "stream",
        "event",
        "context",
    ]
    with pytest.raises(RuntimeError, match="still live"):
        cuda.standin.reset()

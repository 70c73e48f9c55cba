"""The stand-in for libcuda: order of accesses, life times, failures, and versions."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import standin as builds
from tests.helpers.cuda_calls import ANY, DURING_CALL, MIB, U64, Cuda
from tests.helpers.standin import HOST
from tests.transfer.standin_fixtures import HOST_FN, Gate, clean, violation

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


# Failures.


def test_the_nth_call_fails_and_does_nothing(cuda: Cuda) -> None:
    live = cuda.standin.live()
    cuda.standin.fail("cuEventCreate", 2)
    first = cuda.make("cuEventCreate", 0)
    assert cuda.result("cuEventCreate", ctypes.byref(U64()), 0) == OUT_OF_MEMORY
    cuda.standin.fail("cuEventDestroy", error=999)
    assert cuda.result("cuEventDestroy", first) == 999
    cuda.do("cuEventDestroy", first)
    assert cuda.standin.live() == live
    assert cuda.standin.calls("cuEventCreate") == 2


def test_a_copy_that_fails_fails_the_context(cuda: Cuda) -> None:
    [device], (memory, at), stream = cuda.device(), cuda.host(), cuda.stream()
    waiter, event, late = cuda.stream(), cuda.event(), cuda.event()
    memory[:8] = b"abcdefgh"
    cuda.standin.fail_copy(builds.HOST_TO_DEVICE, 2)
    codes: list[int] = []

    def wait() -> None:
        cuda.do("cuCtxSetCurrent", context)
        codes.append(cuda.result("cuEventSynchronize", late))

    context = cuda.make("cuCtxGetCurrent")
    gate = Gate(cuda, stream)
    other_gate = Gate(cuda, waiter)
    assert cuda.batch(stream, [(device, at, 8)]) == 0
    assert cuda.batch(stream, [(device + 8, at, 8)]) == 0
    cuda.do("cuEventRecord", event, stream)
    cuda.do("cuStreamWaitEvent", waiter, event, 0)
    cuda.do("cuEventRecord", late, waiter)
    thread = threading.Thread(target=wait)
    thread.start()
    gate.open()
    thread.join(20)
    assert codes == [ILLEGAL_ADDRESS]  # although that stream is still held
    other_gate.open()
    for name in ("cuStreamSynchronize", "cuStreamQuery"):
        assert cuda.result(name, waiter) == ILLEGAL_ADDRESS
    assert cuda.result("cuEventQuery", event) == ILLEGAL_ADDRESS
    assert cuda.batch(stream, [(device, at, 8)]) == ILLEGAL_ADDRESS
    assert cuda.result("cuMemAlloc", ctypes.byref(U64()), 8) == ILLEGAL_ADDRESS
    assert ctypes.string_at(device, 9) == b"abcdefgh\xa5"
    name = ctypes.c_char_p()
    cuda.do("cuGetErrorName", ILLEGAL_ADDRESS, ctypes.byref(name))
    assert name.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    cuda.close()  # ends return the error too, but end
    assert cuda.standin.live() == []
    clean(cuda)


def test_delay_tear_and_link(cuda: Cuda) -> None:
    [device], (memory, at), stream = cuda.device(), cuda.host(), cuda.stream()
    memory[:] = b"b" * MIB

    def seconds(size: int) -> float:
        start = time.monotonic()
        assert cuda.batch(stream, [(device, at, size)]) == 0
        cuda.do("cuStreamSynchronize", stream)
        return time.monotonic() - start

    cuda.standin.delay(20, 20, 1 << builds.HOST_TO_DEVICE)
    assert seconds(8) > 0.019
    cuda.standin.clear()
    cuda.standin.link(10e6)
    assert seconds(500_000) > 0.049
    cuda.standin.clear()
    cuda.standin.tear(500)
    assert cuda.batch(stream, [(device + MIB, at, 1000)]) == 0
    while ctypes.string_at(device + MIB + 499, 1) != b"b":
        time.sleep(0.001)
    assert ctypes.string_at(device + MIB, 1000) == b"b" * 500 + b"\xa5" * 500
    cuda.do("cuStreamSynchronize", stream)
    assert ctypes.string_at(device + MIB, 1000) == b"b" * 1000


# Versions and kernels.


def test_functions_by_name_and_version(cuda: Cuda) -> None:
    def find(name: str, version: int) -> tuple[int, str, int]:
        function, status = ctypes.c_void_p(), ctypes.c_int(-1)
        code = cuda.result(
            "cuGetProcAddress", name.encode(), ctypes.byref(function), version, 0,
            ctypes.byref(status),
        )  # fmt: skip
        exported = {
            ctypes.cast(getattr(cuda.standin.library, n), ctypes.c_void_p).value: n
            for n in (name, name + "_v2")
            if hasattr(cuda.standin.library, n)
        }
        return code, exported.get(function.value, ""), status.value

    assert find("cuMemcpyBatchAsync", 13000) == (0, "cuMemcpyBatchAsync_v2", 0)
    assert find("cuMemcpyBatchAsync", 12080) == (0, "cuMemcpyBatchAsync", 0)
    assert find("cuMemcpyBatchAsync", 12000) == (0, "", 2)
    assert find("cuStreamDestroy", 12000) == (0, "cuStreamDestroy_v2", 0)
    assert find("cuNoSuchThing", 12000) == (0, "", 1)
    assert find("cuInit", 13010)[0] == INVALID_VALUE
    cuda.standin.set(driver_version=12000)
    assert find("cuMemcpyBatchAsync", 12000) == (0, "", 1)
    cuda.standin.set(batch_supported=0)
    assert cuda.batch(cuda.stream(), [(1, 1, 1)]) == NOT_SUPPORTED


def test_a_kernel(cuda: Cuda) -> None:
    [device], stream, standin = cuda.device(), cuda.stream(), cuda.standin

    def address(params: Any) -> int:
        return int(ctypes.cast(params[0], ctypes.POINTER(U64)).contents.value)

    def run(params: Any, grid: Any, _: Any) -> None:
        ctypes.memset(address(params), grid[0], 100)

    def declare(params: Any, _: Any, __: Any) -> None:
        standin.touch(address(params), 100, write=True)

    standin.register_kernel("fill", run, [8], declare)
    module = cuda.make("cuModuleLoadData", b"image")
    name = ctypes.c_char_p(b"fill")
    function = cuda.make("cuModuleGetFunction", module, name)
    parameter = U64(device)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
    gate = Gate(cuda, stream)
    launch = (3, 1, 1, 32, 1, 1, 0, stream, parameters, None)
    cuda.do("cuLaunchKernel", function, *launch)
    parameter.value = 0  # was copied
    gate.open()
    other = cuda.stream()
    cuda.do("cuMemsetD8Async", device + 99, 0, 1, other)
    violation(cuda, "cuLaunchKernel writes .*cuMemsetD8Async writes")
    cuda.do("cuCtxSynchronize")
    assert ctypes.string_at(device, 99) == b"\3" * 99
    cuda.do("cuModuleUnload", module)


@pytest.mark.sanitizer
@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_under_a_sanitizer(tmp_path: Path, sanitize: str, run_native: Callable[..., str]) -> None:
    program = tmp_path / "exercise"
    source = builds.SOURCES / "test" / "exercise.cpp"
    builds.compile_native(program, source, "-ldl", sanitize=sanitize)
    library = builds.library_folder(sanitize) / builds.NAME
    assert "no wrong byte, no violation" in run_native(program, library)


def test_callback_keeps_its_argument(cuda: Cuda) -> None:
    seen: list[int] = []
    function = HOST_FN(lambda value: seen.append(value or 0))
    stream = cuda.stream()
    cuda.do("cuLaunchHostFunc", stream, function, 41)
    cuda.do("cuStreamSynchronize", stream)
    assert seen == [41]

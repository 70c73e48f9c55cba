"""The stand-in for libcuda: what it allows, and that each of its checks fires."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time

import pytest

from tests.engine.standin_fixtures import HOST_FN, Gate, clean, violation
from tests.helpers import standin as builds
from tests.helpers.cuda_calls import MIB, PINNED, U64, Cuda

INVALID_VALUE, OUT_OF_MEMORY, NOT_READY = 1, 2, 600
INVALID_CONTEXT, INVALID_HANDLE = 201, 400
NOT_PERMITTED = 800
GARBAGE = b"\xa5"

pytestmark = pytest.mark.skipif(builds.include_folder() is None, reason="no cuda.h")


# Memory.


def test_reserve_map_and_alias(cuda: Cuda) -> None:
    first, second = cuda.device(aliases=2)
    assert first % (2 * MIB) == 0
    assert ctypes.string_at(first, 4) == GARBAGE * 4
    ctypes.memset(first, 7, 100)
    assert ctypes.string_at(second, 100) == b"\7" * 100
    assert cuda.reserve(2 * MIB, 64 * MIB) % (64 * MIB) == 0
    clean(cuda)


def test_handle_released_while_mapped_keeps_memory(cuda: Cuda) -> None:
    base, handle = cuda.reserve(2 * MIB), cuda.create(2 * MIB)
    cuda.map(base, 2 * MIB, handle)
    cuda.end("cuMemRelease", handle)
    assert cuda.set_access(base, 2 * MIB) == 0
    assert ctypes.string_at(base, 1) == GARBAGE
    free, total = U64(), U64()
    cuda.do("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    assert total.value - free.value == 2 * MIB
    cuda.end("cuMemUnmap", base, 2 * MIB)
    cuda.do("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    assert total.value == free.value
    clean(cuda)


@pytest.mark.parametrize(
    ("name", "at", "size", "offset", "pattern"),
    [
        ("cuMemMap", 0, 2 * MIB, 0, "mapped already"),
        ("cuMemMap", 4 * MIB, 4 * MIB, 0, "not the whole handle"),
        ("cuMemMap", 4 * MIB, 2 * MIB, 4096, "not the whole handle"),
        ("cuMemMap", 4 * MIB + 4096, 2 * MIB, 0, "not aligned"),
        ("cuMemMap", 8 * MIB, 2 * MIB, 0, "inside one reservation"),
        ("cuMemUnmap", 0, MIB, None, "no whole mappings"),
        ("cuMemUnmap", 0, 6 * MIB, None, "no whole mappings"),
        ("cuMemAddressFree", 0, 8 * MIB, None, "has mappings"),
        ("cuMemAddressFree", 0, 4 * MIB, None, "no whole reservation"),
    ],
)
def test_wrong_mapping_calls(
    cuda: Cuda, name: str, at: int, size: int, offset: int | None, pattern: str
) -> None:
    base, handle = cuda.reserve(8 * MIB), cuda.create(2 * MIB)
    cuda.map(base, 2 * MIB, handle)
    more = () if offset is None else (offset, handle, 0)
    assert cuda.result(name, base + at, size, *more) == INVALID_VALUE
    violation(cuda, pattern)


def test_wrong_handles(cuda: Cuda) -> None:
    base = cuda.reserve(2 * MIB)
    assert cuda.result("cuMemMap", base, 2 * MIB, 0, 7, 0) == INVALID_VALUE
    assert cuda.result("cuMemRelease", 7) == INVALID_VALUE
    assert all("0x7 is no handle" in text for text in cuda.standin.violations())


def test_set_access_covers_whole_mappings(cuda: Cuda) -> None:
    base, handle = cuda.reserve(8 * MIB), cuda.create(2 * MIB)
    cuda.map(base, 2 * MIB, handle)
    assert cuda.set_access(base, 4 * MIB) == INVALID_VALUE
    violation(cuda, "cuts mappings or a hole")


def test_device_memory_is_bounded(cuda: Cuda) -> None:
    cuda.standin.set(device_memory=4 * MIB)
    cuda.create(4 * MIB)
    assert cuda.result("cuMemAlloc", ctypes.byref(U64()), 1) == OUT_OF_MEMORY
    out = ctypes.byref(U64())
    assert cuda.result("cuMemCreate", out, 2 * MIB, ctypes.byref(PINNED), 0) == OUT_OF_MEMORY


def test_registration(cuda: Cuda) -> None:
    _, at = cuda.host()
    assert cuda.make("cuMemHostGetDevicePointer", at, 0) == at
    assert cuda.result("cuMemHostRegister", at + 4096, 4096, 0) == 712
    assert cuda.result("cuMemHostUnregister", at + 4096) == 713
    assert cuda.result("cuMemHostRegister", 4096, 4096, 0) == INVALID_VALUE
    assert len(cuda.standin.violations()) == 3
    cuda.standin.set(register_limit=MIB)
    other = ctypes.create_string_buffer(4096)
    assert cuda.result("cuMemHostRegister", other, 4096, 0) == OUT_OF_MEMORY


def test_device_pointer_that_the_host_cannot_use(cuda: Cuda) -> None:
    cuda.standin.set(can_use_host_pointer=0)
    memory, at = cuda.host()
    memory[:3] = b"abc"
    [device], stream = cuda.device(), cuda.stream()
    pointer = cuda.make("cuMemHostGetDevicePointer", at, 0)
    assert pointer != at
    assert cuda.standin.pointer(pointer) == at
    cuda.do("cuMemcpyHtoDAsync", device, pointer, 3, stream)
    cuda.do("cuStreamSynchronize", stream)
    assert ctypes.string_at(device, 3) == b"abc"
    clean(cuda)


# Contexts.


def test_calls_need_init_and_a_context() -> None:
    program = """
import ctypes
from tests.helpers import standin
from tests.helpers.cuda_calls import Cuda, U64
cuda = Cuda(standin.load())
out = ctypes.byref(U64())
assert cuda.result("cuDeviceGetCount", out) == 3
assert cuda.result("cuMemAlloc", out, 8) == 3
cuda.do("cuInit", 0)
assert cuda.result("cuMemAlloc", out, 8) == 201
context = cuda.make("cuDevicePrimaryCtxRetain", 0)
cuda.do("cuCtxSetCurrent", context)
assert cuda.make("cuMemAlloc", 8)
assert cuda.result("cuDevicePrimaryCtxRelease", 0) == 0
assert "the context ends while used" in cuda.standin.violations()[0]
assert cuda.result("cuMemAlloc", out, 8) == 709
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_thread_without_a_context(cuda: Cuda) -> None:
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(cuda.result("cuMemAlloc", ctypes.byref(U64()), 8))
    )
    thread.start()
    thread.join()
    assert codes == [INVALID_CONTEXT]


# Streams and events.


def test_stream_runs_in_order_and_callbacks_may_not_call(cuda: Cuda) -> None:
    stream, seen = cuda.stream(), []
    functions = [HOST_FN(lambda _, i=i: seen.append(i)) for i in range(20)]
    for function in functions:
        cuda.do("cuLaunchHostFunc", stream, function, None)
    cuda.do("cuStreamSynchronize", stream)
    assert seen == list(range(20))
    clean(cuda)
    call = HOST_FN(lambda _: seen.append(cuda.result("cuCtxSynchronize")))
    cuda.do("cuLaunchHostFunc", stream, call, None)
    cuda.do("cuStreamSynchronize", stream)
    assert seen[-1] == NOT_PERMITTED
    violation(cuda, "inside a host function")


def test_wait_means_the_newest_record_at_the_call(cuda: Cuda) -> None:
    held, free, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda.do("cuStreamWaitEvent", free, event, 0)  # never recorded: passes
    cuda.do("cuEventQuery", event)
    cuda.do("cuEventRecord", event, free)
    cuda.do("cuStreamWaitEvent", free, event, 0)
    gate = Gate(cuda, held)
    cuda.do("cuEventRecord", event, held)
    cuda.do("cuStreamSynchronize", free)
    assert cuda.result("cuEventQuery", event) == NOT_READY
    cuda.do("cuStreamWaitEvent", free, event, 0)
    assert cuda.result("cuStreamQuery", free) == NOT_READY
    cuda.do("cuEventRecord", event, 0)  # done at once, and no business of the wait before
    cuda.do("cuEventQuery", event)
    assert cuda.result("cuStreamQuery", free) == NOT_READY
    cuda.end("cuEventDestroy", event)
    gate.open()
    cuda.do("cuStreamSynchronize", free)
    clean(cuda)


def test_null_stream_is_the_calling_thread(cuda: Cuda) -> None:
    stream, event, seen = cuda.stream(), cuda.event(), []
    function = HOST_FN(lambda _: seen.append(threading.get_ident()))
    cuda.do("cuLaunchHostFunc", 0, function, None)
    assert seen == [threading.get_ident()]
    gate = Gate(cuda, stream)
    cuda.do("cuEventRecord", event, stream)
    threading.Timer(0.05, gate.open).start()
    start = time.monotonic()
    cuda.do("cuStreamWaitEvent", 0, event, 0)
    assert time.monotonic() - start > 0.04
    [device], (_, at) = cuda.device(), cuda.host()
    assert cuda.batch(0, [(device, at, 8)]) == INVALID_VALUE


def test_elapsed(cuda: Cuda) -> None:
    stream, timed, other, untimed = cuda.stream(), cuda.event(0), cuda.event(0), cuda.event()
    out = ctypes.c_float()

    def elapsed(end: int) -> int:
        return cuda.result("cuEventElapsedTime", ctypes.byref(out), timed, end)

    assert elapsed(other) == INVALID_HANDLE  # no record
    cuda.do("cuEventRecord", timed, stream)
    gate = Gate(cuda, stream)
    cuda.do("cuEventRecord", other, stream)
    cuda.do("cuEventRecord", untimed, stream)
    assert elapsed(other) == NOT_READY
    cuda.do("cuEventSynchronize", timed)
    time.sleep(0.01)
    gate.open()
    cuda.do("cuStreamSynchronize", stream)
    assert elapsed(other) == 0
    assert out.value >= 9
    assert elapsed(untimed) == INVALID_HANDLE


def test_stream_destroyed_with_work_in_flight(cuda: Cuda) -> None:
    stream, seen = cuda.stream(), []
    gate = Gate(cuda, stream)
    function = HOST_FN(lambda _: seen.append(1))
    cuda.do("cuLaunchHostFunc", stream, function, None)
    cuda.end("cuStreamDestroy", stream)
    assert seen == []
    gate.open()
    cuda.do("cuCtxSynchronize")
    assert seen == [1]
    assert cuda.result("cuStreamSynchronize", stream) == INVALID_HANDLE
    violation(cuda, "no such stream")


# Life times.


def test_things_that_are_not_there(cuda: Cuda) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    codes = [
        cuda.result("cuEventDestroy", 7),
        cuda.result("cuEventRecord", 7, stream),
        cuda.result("cuStreamDestroy", 7),
        cuda.result("cuMemFree", device),
        cuda.result("cuModuleUnload", 7),
        cuda.result("cuMemHostGetDevicePointer", ctypes.byref(U64()), at - 8, 0),
        cuda.result("cuMemsetD8Async", at, 0, 8, stream),  # not of the device
    ]
    assert 0 not in codes
    words = ["no such event"] * 2 + ["no such stream", "not from cuMemAlloc", "no such module"]
    words += ["is not registered", "is not device memory"]
    for word, text in zip(words, cuda.standin.violations(), strict=True):
        assert word in text


def test_kept_context_is_released_once(cuda: Cuda) -> None:
    cuda.end("cuDevicePrimaryCtxRelease", 0)
    assert cuda.result("cuDevicePrimaryCtxRelease", 0) == INVALID_CONTEXT
    violation(cuda, "released too often")
    assert cuda.result("cuCtxSynchronize") == 709

"""The stand-in for libcuda: failures, versions, kernels."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.standin_fixtures import HOST_FN, Gate, clean, violation
from tests.helpers import standin as builds
from tests.helpers.cuda_calls import MIB, U64, Cuda

INVALID_VALUE, OUT_OF_MEMORY, NOT_READY = 1, 2, 600
ILLEGAL_ADDRESS, NOT_SUPPORTED = 700, 801

pytestmark = pytest.mark.skipif(builds.include_folder() is None, reason="no cuda.h")


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


def test_a_wrong_name_is_refused(cuda: Cuda) -> None:
    with pytest.raises(KeyError):
        cuda.standin.fail("cuMemCrate")
    with pytest.raises(KeyError):
        cuda.standin.set(granulrity=1)


def test_later_dlopen_finds_it(cuda: Cuda) -> None:
    again = ctypes.CDLL(builds.NAME)
    assert again._handle == cuda.standin.library._handle


def test_in_a_subprocess(tmp_path: Path) -> None:
    report = tmp_path / "report"
    program = """
import ctypes
library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
library.cuDriverGetVersion(ctypes.byref(version))
assert version.value == 12080
library.cuInit(0)
library.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)
library.cuMemRelease(ctypes.c_uint64(7))
"""
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(builds.library_folder()),
            builds.ENVIRONMENT: f"driver_version=12080,link=1e9,report={report}",
        },
    )
    lines = report.read_text().splitlines()
    assert lines[1:] == [
        "cuMemRelease: 0x7 is no handle",
        "live:",
        "context of device 0, retained 1 times",
    ]

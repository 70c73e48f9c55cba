"""Copies of the stand-in for libcuda: what they check, and when they read."""

from __future__ import annotations

import ctypes
import mmap
import time

import pytest

from tests.engine.standin_fixtures import Gate, clean, violation
from tests.helpers import standin as builds
from tests.helpers.cuda_calls import ANY, DURING_CALL, MIB, STREAM, U64, Attributes, Cuda

INVALID_VALUE = 1

pytestmark = pytest.mark.skipif(builds.include_folder() is None, reason="no cuda.h")


def test_batch_copies_both_ways(cuda: Cuda) -> None:
    [device], (memory, at), stream = cuda.device(), cuda.host(), cuda.stream()
    memory[:3000] = bytes(i % 251 for i in range(3000))
    assert cuda.batch(stream, [(device + i, at + i, 1000) for i in (0, 1000, 2000)]) == 0
    back = at + 500_000
    assert cuda.batch(stream, [(back, device, 1500), (back + 1500, device + 1500, 1500)]) == 0
    cuda.do("cuStreamSynchronize", stream)
    assert memory[500_000:503_000] == memory[:3000]
    assert cuda.standin.copied(builds.HOST_TO_DEVICE) == (3, 3000)
    assert cuda.standin.copied(builds.DEVICE_TO_HOST) == (2, 3000)
    assert cuda.standin.calls("cuMemcpyBatchAsync") == 2
    clean(cuda)


def test_old_signature_names_the_copy_that_failed(cuda: Cuda) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    fail, attribute = U64(), Attributes(STREAM)
    code = cuda.standin.library.cuMemcpyBatchAsync(
        (U64 * 2)(device, device),
        (U64 * 2)(at, 8),
        (U64 * 2)(8, 8),
        U64(2),
        ctypes.byref(attribute),
        (U64 * 1)(0),
        U64(1),
        ctypes.byref(fail),
        U64(stream),
    )
    assert (code, fail.value) == (INVALID_VALUE, 1)
    violation(cuda, "copy 1: source .* is not registered")


@pytest.mark.parametrize(
    ("at_device", "at_host", "size", "pattern"),
    [
        (0, MIB - 4, 8, "beyond the registration"),
        (0, -4, 8, "not registered"),
        (2 * MIB - 4, 0, 8, "beyond the reservation"),
        (0, 0, 0, "no bytes"),
    ],
)
def test_wrong_addresses(cuda: Cuda, at_device: int, at_host: int, size: int, pattern: str) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    copy = (device + at_device, at + at_host, size)
    assert cuda.batch(stream, [copy]) == INVALID_VALUE
    violation(cuda, pattern)


def test_wrong_direction_and_no_access(cuda: Cuda) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    assert cuda.result("cuMemcpyHtoDAsync", at, device, 8, stream) == INVALID_VALUE
    violation(cuda, "wrong direction")
    assert cuda.set_access(device, 2 * MIB, 1) == 0  # to be read only
    assert cuda.result("cuMemsetD8Async", device, 0, 8, stream) == INVALID_VALUE
    assert "not accessible" in cuda.standin.violations()[1]


@pytest.mark.parametrize("starts", [(1,), (0, 0), (0, 1, 2)])
def test_wrong_attribute_starts(cuda: Cuda, starts: tuple[int, ...]) -> None:
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    copies = [(device, at, 8), (device + 8, at + 8, 8)]
    assert cuda.batch(stream, copies, starts=starts) == INVALID_VALUE
    assert cuda.batch(stream, copies, order=0) == INVALID_VALUE
    assert all("attributes" in text for text in cuda.standin.violations())


@pytest.mark.parametrize("order", [STREAM, DURING_CALL, ANY])
def test_when_the_source_is_read(cuda: Cuda, order: int) -> None:
    [device], (memory, at), stream = cuda.device(), cuda.host(), cuda.stream()
    memory[:1] = b"a"
    gate = Gate(cuda, stream)
    assert cuda.batch(stream, [(device, at, 1)], order) == 0
    memory[:1] = b"b"
    gate.open()
    cuda.do("cuStreamSynchronize", stream)
    assert ctypes.string_at(device, 1) == (b"b" if order == STREAM else b"a")
    clean(cuda)


class Copy2D(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("src_x", "src_y", "src_type", "src_host", "src_device", "src_array", "src_pitch"),
            *("dst_x", "dst_y", "dst_type", "dst_host", "dst_device", "dst_array", "dst_pitch"),
            *("width", "height"),
        )
    )


def test_rows_of_a_2d_copy(cuda: Cuda) -> None:
    [device], (memory, at), stream = cuda.device(), cuda.host(), cuda.stream()
    memory[:9] = b"abcdefghi"
    cuda.do("cuMemsetD8Async", device, ord("."), 16, stream)
    host, on_device = 1, 2
    copy = Copy2D(
        src_type=host, src_host=at, src_pitch=3, dst_type=on_device, dst_device=device,
        dst_pitch=5, width=3, height=3,
    )  # fmt: skip
    cuda.do("cuMemcpy2DAsync", ctypes.byref(copy), stream)
    back = Copy2D(
        src_type=on_device, src_device=device + 5, src_pitch=5, dst_type=host,
        dst_host=at + 100, dst_pitch=2, width=2, height=2,
    )  # fmt: skip
    cuda.do("cuMemcpy2DAsync", ctypes.byref(back), stream)
    cuda.do("cuStreamSynchronize", stream)
    assert ctypes.string_at(device, 16) == b"abc..def..ghi..."
    assert memory[100:104] == b"degh"
    clean(cuda)
    copy.dst_pitch = 2
    assert cuda.result("cuMemcpy2DAsync", ctypes.byref(copy), stream) == INVALID_VALUE
    violation(cuda, "sizes that are not here")


# What may be set to be as on a device: engines, costs, memory that is not registered.


def seconds(cuda: Cuda, *streams: int) -> list[float]:
    """When each of the streams is done, in their order."""
    begin, found = time.perf_counter(), []
    for stream in streams:
        cuda.do("cuStreamSynchronize", stream)
        found.append(time.perf_counter() - begin)
    return found


@pytest.mark.alone
@pytest.mark.parametrize("engines", [0, 1])
def test_a_copy_engine_stays_with_a_stream(cuda: Cuda, engines: int) -> None:
    """A small copy of another stream waits for all that is ready there, or for one copy."""
    [device], (_, at) = cuda.device(), cuda.host()
    large, small = cuda.stream(), cuda.stream()
    cuda.standin.set(copy_engines=engines)
    cuda.standin.link(10_000 / 0.02)
    begin = time.perf_counter()
    for i in range(4):
        assert cuda.batch(large, [(device + 10_000 * i, at, 10_000)]) == 0
    time.sleep(0.005)
    assert cuda.batch(small, [(device + 500_000, at + 500_000, 8)]) == 0
    seconds(cuda, small)
    assert (time.perf_counter() - begin > 0.075) is bool(engines)
    seconds(cuda, large)
    clean(cuda)


@pytest.mark.alone
def test_an_engine_is_left_where_a_stream_has_to_wait(cuda: Cuda) -> None:
    [device], (_, at) = cuda.device(), cuda.host()
    large, small, gated = cuda.stream(), cuda.stream(), cuda.stream()
    cuda.standin.set(copy_engines=1)
    cuda.standin.link(10_000 / 0.02)
    gate, event = Gate(cuda, gated), cuda.event()
    cuda.do("cuEventRecord", event, gated)
    assert cuda.batch(large, [(device, at, 10_000)]) == 0
    cuda.do("cuStreamWaitEvent", large, event, 0)
    assert cuda.batch(large, [(device + 10_000, at, 10_000)]) == 0
    assert cuda.batch(small, [(device + 500_000, at + 500_000, 8)]) == 0
    (first,) = seconds(cuda, small)
    assert first < 0.1
    gate.open()
    seconds(cuda, large)
    clean(cuda)


@pytest.mark.alone
def test_each_copy_has_a_cost(cuda: Cuda) -> None:
    """On the link for the device, and in the call for whoever submits."""
    [device], (_, at), stream = cuda.device(), cuda.host(), cuda.stream()
    copies = [(device + 16 * i, at + 16 * i, 8) for i in range(100)]
    cuda.standin.set(descriptor_ns=300_000)
    begin = time.perf_counter()
    assert cuda.batch(stream, copies) == 0
    assert time.perf_counter() - begin < 0.02
    assert seconds(cuda, stream)[0] > 0.025
    cuda.standin.set(descriptor_ns=0, submit_ns=300_000)
    begin = time.perf_counter()
    assert cuda.batch(stream, copies) == 0
    assert time.perf_counter() - begin > 0.03
    clean(cuda)


@pytest.mark.alone
def test_memory_that_is_not_registered_is_slow_and_waits(cuda: Cuda) -> None:
    """Where it is let: then nothing is refused, and the call returns when the copy is over."""
    [device], stream = cuda.device(), cuda.stream()
    plain = ctypes.create_string_buffer(b"\5" * 10_000)
    at = ctypes.addressof(plain)
    assert cuda.batch(stream, [(device, at, 10_000)]) == INVALID_VALUE
    violation(cuda, "not registered")
    cuda.standin.set(pageable=10_000 * 25)
    begin = time.perf_counter()
    assert cuda.batch(stream, [(device, at, 10_000)]) == 0
    assert time.perf_counter() - begin > 0.03
    assert ctypes.string_at(device, 4) == b"\5" * 4
    assert cuda.standin.get("pageable_batches") == 1
    assert len(cuda.standin.violations()) == 1


def test_a_registration_may_be_too_large(cuda: Cuda) -> None:
    """Linux 6.11 to 6.13 refuse it from 2 GiB on."""
    memory = mmap.mmap(-1, 2 * MIB)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    cuda.standin.set(register_most=2 * MIB)
    assert cuda.result("cuMemHostRegister", at, 2 * MIB, 0) == INVALID_VALUE
    cuda.do("cuMemHostRegister", at, 2 * MIB - 4096, 0)
    cuda.do("cuMemHostUnregister", at)
    clean(cuda)

"""Copies of the stand-in for libcuda: what they check, and when they read."""

from __future__ import annotations

import ctypes

import pytest

from tests.helpers import standin as builds
from tests.helpers.cuda_calls import ANY, DURING_CALL, MIB, STREAM, U64, Attributes, Cuda
from tests.transfer.standin_fixtures import Gate, clean, violation

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

"""CUDA driver calls through the stand-in, as short as tests of it need them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

from tests.helpers.standin import Standin

MIB = 1 << 20
STREAM, DURING_CALL, ANY = 1, 2, 3  # order in which a copy reads its source
NON_BLOCKING = 1
DISABLE_TIMING = 2


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationProp(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class AccessDesc(ctypes.Structure):
    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class Attributes(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("src", Location),
        ("dst", Location),
        ("flags", ctypes.c_uint),
    )


DEVICE0 = Location(1, 0)
PINNED = AllocationProp(type=1, location=DEVICE0)
VARIANTS = dict.fromkeys(
    (
        "cuDevicePrimaryCtxRelease",
        "cuDeviceTotalMem",
        "cuEventDestroy",
        "cuEventElapsedTime",
        "cuGetProcAddress",
        "cuMemAlloc",
        "cuMemFree",
        "cuMemGetInfo",
        "cuMemHostGetDevicePointer",
        "cuMemHostRegister",
        "cuMemcpyBatchAsync",
        "cuMemcpyDtoHAsync",
        "cuMemcpyHtoDAsync",
        "cuMemsetD8",
        "cuMemcpy2DAsync",
        "cuStreamBeginCapture",
        "cuStreamDestroy",
    ),
    "_v2",
)

U64 = ctypes.c_uint64


class CudaError(Exception):
    """A call's result."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} returned {code}")
        self.code = code


class Cuda:
    """Calls by name; integers are passed as 64 bits. What it makes it ends in ``close``."""

    def __init__(self, standin: Standin) -> None:
        self.standin = standin
        self._undo: list[tuple[Any, ...]] = []
        self._memory: list[mmap.mmap] = []  # copies may run when a test has forgotten it

    def result(self, name: str, *arguments: Any) -> int:
        """The code a call returns."""
        function = getattr(self.standin.library, name + VARIANTS.get(name, ""))
        passed = [U64(a) if isinstance(a, int) else a for a in arguments]
        return int(function(*passed))

    def do(self, name: str, *arguments: Any) -> None:
        """A call that must succeed."""
        code = self.result(name, *arguments)
        if code:
            raise CudaError(name, code)

    def make(self, name: str, *arguments: Any) -> int:
        """A call that must succeed and writes one number."""
        out = U64()
        self.do(name, ctypes.byref(out), *arguments)
        return out.value

    def start(self) -> None:
        """cuInit and the primary context of device 0, current."""
        self.do("cuInit", 0)
        self.do("cuCtxSetCurrent", self.make("cuDevicePrimaryCtxRetain", 0))
        self._undo.append(("cuDevicePrimaryCtxRelease", 0))

    def reserve(self, size: int, alignment: int = 0) -> int:
        address = self.make("cuMemAddressReserve", size, alignment, 0, 0)
        self._undo.append(("cuMemAddressFree", address, size))
        return address

    def create(self, size: int) -> int:
        handle = self.make("cuMemCreate", size, ctypes.byref(PINNED), 0)
        self._undo.append(("cuMemRelease", handle))
        return handle

    def map(self, address: int, size: int, handle: int) -> None:
        self.do("cuMemMap", address, size, 0, handle, 0)
        self._undo.append(("cuMemUnmap", address, size))

    def set_access(self, address: int, size: int, flags: int = 3) -> int:
        desc = AccessDesc(DEVICE0, flags)
        return self.result("cuMemSetAccess", address, size, ctypes.byref(desc), 1)

    def device(self, size: int = 2 * MIB, aliases: int = 1) -> list[int]:
        """One handle, mapped at as many addresses, in one reservation."""
        base, handle = self.reserve(size * aliases), self.create(size)
        for i in range(aliases):
            self.map(base + i * size, size, handle)
        assert self.set_access(base, size * aliases) == 0
        return [base + i * size for i in range(aliases)]

    def host(self, size: int = MIB) -> tuple[mmap.mmap, int]:
        """Registered host memory and its address."""
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._memory.append(memory)
        self.do("cuMemHostRegister", address, size, 0)
        self._undo.append(("cuMemHostUnregister", address))
        return memory, address

    def stream(self) -> int:
        stream = self.make("cuStreamCreateWithPriority", NON_BLOCKING, 0)
        self._undo.append(("cuStreamDestroy", stream))
        return stream

    def event(self, flags: int = DISABLE_TIMING) -> int:
        event = self.make("cuEventCreate", flags)
        self._undo.append(("cuEventDestroy", event))
        return event

    def batch(
        self,
        stream: int,
        copies: Sequence[tuple[int, int, int]],  # destination, source, bytes
        order: int = STREAM,
        starts: Sequence[int] = (0,),
    ) -> int:
        """The code of a batch copy."""
        columns = [(U64 * len(copies))(*column) for column in zip(*copies, strict=True)]
        attributes = (Attributes * len(starts))(*[Attributes(order) for _ in starts])
        return self.result(
            "cuMemcpyBatchAsync",
            *columns,
            len(copies),
            attributes,
            (U64 * len(starts))(*starts),
            len(starts),
            stream,
        )

    def end(self, *call: Any) -> None:
        """Ends one thing now, and not in ``close``."""
        self.do(*call)
        self._undo.remove(call)

    def close(self) -> None:
        """Ends all that was made, newest first, whatever the calls return."""
        self.result("cuCtxSynchronize")
        while self._undo:
            self.result(*self._undo.pop())
        self.result("cuCtxSetCurrent", None)  # The thread goes on, its context does not.

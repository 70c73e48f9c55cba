"""The gather kernel on the stand-in for libcuda: its host build, made when needed."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from benchmarks.harness.builds import CSRC, build_once
from pie_vllm.engine.gather import ENTRY, GatherImage, NoGather
from tests.helpers.builds import PROGRAMS
from tests.helpers.standin import BUILDS, FLAGS, SOURCES, Standin, compile_native, load

SOURCE = SOURCES / "test" / "gather_kernel.cpp"
IMAGE = b"any bytes load on the stand-in"


def any_image(arch: str | None, *, ahead: bool = True) -> GatherImage | NoGather:
    """In place of ``gather_image``."""
    assert arch == "sm_90"
    return GatherImage(IMAGE, "ahead" if ahead else "nvrtc")


def _build() -> Path:
    kernel = CSRC / "kernels" / "gather.cu"
    files = [SOURCE, SOURCES / "standin.h", kernel, PROGRAMS / "gather_host.h"]
    digest = hashlib.sha256(repr(FLAGS).encode() + b"".join(f.read_bytes() for f in files))
    target = BUILDS / f"gather-{digest.hexdigest()[:16]}" / "gather.so"
    flags = ("-shared", "-O2", f"-iquote{CSRC}", f"-iquote{PROGRAMS}")
    build_once(target, lambda: compile_native(target, SOURCE, *flags))
    return target


class GatherKernel:
    """What modules of the stand-in hold under the kernel's name."""

    def __init__(self, standin: Standin) -> None:
        self._library = library = ctypes.CDLL(str(_build()))
        for name in ("changed", "astray", "pieces", "grid"):
            getattr(library, f"gather_{name}").restype = ctypes.c_int64
        run, declare = (
            ctypes.cast(f, ctypes.c_void_p) for f in (library.gather_run, library.gather_declare)
        )
        sizes = (ctypes.c_size_t * 6)(*6 * [8])
        standin.library.standin_register_kernel(ENTRY.encode(), run, declare, sizes, len(sizes))

    def run(self, arguments: Sequence[int], grid: int) -> None:
        """One launch, at once and on this thread; it counts as one whose table was changed."""
        values = [ctypes.c_uint64(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        three = ctypes.c_uint * 3
        self._library.gather_run(addresses, three(grid, 1, 1), three(512, 1, 1))

    @property
    def changed(self) -> int:
        """Tables that were written over between their launch and their run."""
        return int(self._library.gather_changed())

    @property
    def astray(self) -> int:
        """Addresses of CPU memory that are not the device's, where it has its own."""
        return int(self._library.gather_astray())

    @property
    def pieces(self) -> int:
        """Pieces copied."""
        return int(self._library.gather_pieces())

    @property
    def grid(self) -> int:
        """Blocks of the newest launch."""
        return int(self._library.gather_grid())

    def wait(self, milliseconds: float) -> None:
        """Launches that run from now on wait before they copy."""
        self._library.gather_wait(ctypes.c_int64(int(milliseconds * 1e3)))

    def wait_by(self, milliseconds: Mapping[int, float]) -> None:
        """Launches of so many blocks wait so long."""
        for grid, each in milliseconds.items():
            wait = ctypes.c_int64(grid), ctypes.c_int64(int(each * 1e3))
            self._library.gather_wait_by(*wait)

    def corrupt(self) -> None:
        """They leave a wrong byte."""
        self._library.gather_break(ctypes.c_int64(1))

    def uncount(self) -> None:
        """They are not counted."""
        self._library.gather_uncounted(ctypes.c_int64(1))

    def reset(self) -> None:
        """Counters and faults as at first."""
        self._library.gather_reset()


@cache
def gather_kernel() -> GatherKernel:
    """Registers it, once a process."""
    return GatherKernel(load())

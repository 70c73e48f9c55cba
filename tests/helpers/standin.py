"""A stand-in for libcuda on host memory, for tests: built when needed, loaded once a process.

It checks what CUDA leaves to luck (tests/standin/standin.h): addresses, life times, order. Tests
end with ``violations()`` and ``live()`` empty. It is never shipped.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness.builds import build_once, compile_cpp

SOURCES = Path(__file__).resolve().parents[1] / "standin"
BUILDS = Path(__file__).resolve().parents[2] / "build" / "standin-cuda"
NAME = "libcuda.so.1"
ENVIRONMENT = "PIE_STANDIN"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, HOST_TO_HOST = range(4)
BOTH = 1 << HOST_TO_DEVICE | 1 << DEVICE_TO_HOST
HOST = (1 << 64) - 1  # as a stream: the calling thread itself

_KERNEL = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
)
Kernel = Callable[[Any, Any, Any], None]


def include_folder() -> Path | None:
    """Where cuda.h is; None where there is none, and so no stand-in."""
    folders = [Path(os.environ["CUDA_HOME"]) / "include"] if os.environ.get("CUDA_HOME") else []
    spec = importlib.util.find_spec("nvidia")
    folders += [
        Path(p) / "cu13" / "include" for p in (spec and spec.submodule_search_locations) or []
    ]
    folders.append(Path("/usr/local/cuda/include"))
    return next((folder for folder in folders if (folder / "cuda.h").exists()), None)


def compile_native(target: Path, source: Path, *flags: str, sanitize: str | None = None) -> None:
    """Compiles a C++ file; warnings are errors.

    Raises:
        RuntimeError: no compiler or no cuda.h, or the compiler failed.
    """
    include = include_folder()
    if include is None:
        raise RuntimeError("the stand-in for libcuda needs cuda.h")
    sanitizer = [f"-fsanitize={sanitize}"] if sanitize else []
    compile_cpp(target, source, *FLAGS, *sanitizer, f"-I{include}", f"-I{SOURCES}", *flags)


def library_folder(sanitize: str | None = None) -> Path:
    """The folder with ``libcuda.so.1``, for ``LD_LIBRARY_PATH``; built when it is not there.

    ``sanitize``: None, "address" or "thread"; such a build needs a program built likewise.
    """
    compiler = os.environ.get("CXX")
    digest = hashlib.sha256(repr((FLAGS, sanitize, include_folder(), compiler)).encode())
    for source in sorted(SOURCES.glob("*.*")):
        digest.update(source.name.encode() + source.read_bytes())
    folder = BUILDS / digest.hexdigest()[:16]
    build_once(folder / NAME, lambda: _compile(folder, sanitize))
    return folder


def _compile(folder: Path, sanitize: str | None) -> None:
    unit = folder / "all.cpp"  # in one piece: the headers cost more than the code
    folder.mkdir(parents=True, exist_ok=True)
    unit.write_text("".join(f'#include "{s.name}"\n' for s in sorted(SOURCES.glob("*.cpp"))))
    # Bsymbolic: the table of functions means its own, whatever else is loaded.
    link = f"-Wl,-soname,{NAME},-Bsymbolic,--version-script={SOURCES / 'exports.map'}"
    # Static TLS: the leak check of old sanitizers crashes on that of a library opened later.
    tls = "-ftls-model=initial-exec"
    compile_native(folder / NAME, unit, "-shared", tls, link, sanitize=sanitize)


@cache
def load(sanitize: str | None = None) -> Standin:
    """Loads the stand-in, so that later ``dlopen("libcuda.so.1")`` in this process finds it."""
    path = library_folder(sanitize) / NAME
    return Standin(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL | os.RTLD_NOW))


class Standin:
    """The control interface; CUDA's own functions are in ``library``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._kernels: list[Any] = []  # C keeps the functions' addresses
        u64, size, text = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_char_p
        i64, real, count = ctypes.c_int64, ctypes.c_double, ctypes.POINTER(ctypes.c_int64)
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "set": (ctypes.c_int, [text, i64]),
            "get": (i64, [text]),
            "fail": (None, [text, i64, ctypes.c_int]),
            "fail_copy": (None, [ctypes.c_int, i64]),
            "delay": (None, [ctypes.c_int, real, real, u64]),
            "tear": (None, [ctypes.c_int, real]),
            "link": (None, [real]),
            "clear": (None, []),
            "access": (ctypes.c_int, [u64, u64, size, ctypes.c_int]),
            "host_fence": (None, []),
            "register_kernel": (
                None,
                [text, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(size), size],
            ),
            "touch": (None, [u64, size, ctypes.c_int]),
            "pointer": (ctypes.c_void_p, [u64]),
            "calls": (i64, [text]),
            "copied": (None, [ctypes.c_int, count, count]),
            "violations": (size, [text, size]),
            "live": (size, [text, size]),
            "reset": (size, [text, size]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, f"standin_{name}")
            function.restype, function.argtypes = result, arguments

    def _text(self, function: Any) -> list[str]:
        buffer = ctypes.create_string_buffer(1 << 20)
        function(buffer, len(buffer))
        return buffer.value.decode().splitlines()

    def _known(self, function: str) -> bytes:
        if not any(hasattr(self.library, function + suffix) for suffix in ("", "_v2")):
            raise KeyError(function)
        return function.encode()

    def set(self, **settings: int) -> None:
        """Changes settings, by the names in ``libcuda/state.cpp``."""
        for key, value in settings.items():
            if self.library.standin_set(key.encode(), value) != 0:
                raise KeyError(key)

    def get(self, key: str) -> int:
        """The value of a setting."""
        return int(self.library.standin_get(key.encode()))

    def fail(self, function: str, nth: int = 1, error: int = 2) -> None:
        """The nth call from now of a function (without version suffix) fails and does nothing."""
        self.library.standin_fail(self._known(function), nth, error)

    def fail_copy(self, direction: int, nth: int = 1) -> None:
        """The nth copy from now of a direction fails when it runs, and with it the context."""
        self.library.standin_fail_copy(direction, nth)

    def delay(self, min_ms: float, max_ms: float, directions: int = BOTH, seed: int = 0) -> None:
        """Each batch waits for a random time before its bytes move."""
        self.library.standin_delay(directions, min_ms, max_ms, seed)

    def tear(self, ms: float, directions: int = BOTH) -> None:
        """Each batch stops for a time when half of every copy is done."""
        self.library.standin_tear(directions, ms)

    def link(self, bytes_per_s: float) -> None:
        """Speed of each direction, shared by all streams; 0: of memcpy."""
        self.library.standin_link(bytes_per_s)

    def clear(self) -> None:
        """Takes all faults back, the link's speed too."""
        self.library.standin_clear()

    def access(self, stream: int, address: int, size: int, *, write: bool) -> int:
        """Tells the race check what compute on a stream does; returns a CUDA error or 0."""
        return int(self.library.standin_access(stream, address, size, write))

    def host_fence(self) -> None:
        """Orders this thread after all threads that called this before."""
        self.library.standin_host_fence()

    def register_kernel(
        self, name: str, run: Kernel, sizes: Sequence[int], declare: Kernel | None = None
    ) -> None:
        """A kernel for modules to find; ``declare`` says by ``touch`` what a launch accesses."""
        functions = [_KERNEL(run), _KERNEL(declare) if declare else None]
        self._kernels += functions
        pointers = [ctypes.cast(f, ctypes.c_void_p) if f else None for f in functions]
        array = (ctypes.c_size_t * len(sizes))(*sizes)
        self.library.standin_register_kernel(name.encode(), *pointers, array, len(sizes))

    def touch(self, address: int, size: int, *, write: bool) -> None:
        """Inside ``declare`` only."""
        self.library.standin_touch(address, size, write)

    def pointer(self, address: int) -> int:
        """What a kernel dereferences for a device address."""
        return int(self.library.standin_pointer(address) or 0)

    def calls(self, function: str) -> int:
        """How often a function (without version suffix) was called."""
        return int(self.library.standin_calls(self._known(function)))

    def copied(self, direction: int) -> tuple[int, int]:
        """Copies of a direction that are complete, and their bytes."""
        copies, size = ctypes.c_int64(), ctypes.c_int64()
        self.library.standin_copied(direction, ctypes.byref(copies), ctypes.byref(size))
        return copies.value, size.value

    def violations(self) -> list[str]:
        """What was done against the rules since the last reset."""
        return self._text(self.library.standin_violations)

    def live(self) -> list[str]:
        """What was made and not yet ended."""
        return self._text(self.library.standin_live)

    def reset(self) -> None:
        """Forgets violations, counters, faults and errors; settings go back.

        Raises:
            RuntimeError: something is live.
        """
        live = self._text(self.library.standin_reset)
        if live:
            raise RuntimeError("still live:\n" + "\n".join(live))

"""C++ programs of tests over the engine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.harness.builds import CSRC, ROOT, build_once, build_script
from pie_vllm.engine.native import DEFAULT_LIBRARY

PROGRAMS = ROOT / "tests" / "csrc"
"""C++ programs and headers of tests."""

TESTING = PROGRAMS / "testing.cpp"

PARTS = {
    "gather": [],
    "free_memory": [CSRC / "drivers" / "free_memory.cpp"],
    "placement": [CSRC / "drivers" / "placement.cpp"],
}
"""Sources that a program of that name needs beside its own; any other program needs the engine
and its interface for tests."""


def build_program(name: str, folder: Path, sanitize: str | None = None) -> Path:
    """Build ``tests/csrc/NAME.cpp`` with what it needs of the engine; returns the program.

    Args:
        name: of the program.
        folder: where it is put.
        sanitize: None, "address" or "thread".

    Raises:
        RuntimeError: there is no compiler, or it failed; the text has its output.
    """
    script = build_script()
    parts = PARTS.get(name, [*script.SOURCES, TESTING])
    without = [] if script.cuda_headers() else script.CUDA_SOURCES
    files = [*(file for file in parts if file not in without), PROGRAMS / f"{name}.cpp"]
    with tempfile.TemporaryDirectory() as scratch:
        unit = Path(scratch) / "all.cpp"  # In one piece: a third of the time.
        unit.write_text("".join(f'#include "{file}"\n' for file in files))
        script.build(folder / name, [unit], shared=False, sanitize=sanitize)
    return folder / name


def program_over_library(name: str, folder: Path) -> Path:
    """Build ``tests/csrc/NAME.cpp``, which keeps to ``pie.h``, over the library as it is installed.

    Args:
        name: of the program.
        folder: where it is put.

    Raises:
        CalledProcessError: the compiler failed.
    """
    files = [PROGRAMS / f"{name}.cpp", TESTING, DEFAULT_LIBRARY]
    flags = ["-std=c++17", "-O1", "-g1", f"-Wl,-rpath,{DEFAULT_LIBRARY.parent}", f"-iquote{CSRC}"]
    compiler = os.environ.get("CXX", "g++")
    target = folder / name
    command = [compiler, *flags, *map(str, files), "-ldl", "-pthread", "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def interface_library() -> Path:
    """The library with the interface for tests; built when it is not there."""
    script = build_script()
    digest = hashlib.sha256(repr((script.FLAGS, os.environ.get("CXX"))).encode())
    for source in [*script.HEADERS, TESTING, PROGRAMS / "testing.h"]:
        digest.update(source.name.encode() + source.read_bytes())
    target = ROOT / "build" / f"testing-{digest.hexdigest()[:16]}" / "libpie_testing.so"
    build_once(target, lambda: script.build(target, [TESTING], shared=True, sanitize=None))
    return target

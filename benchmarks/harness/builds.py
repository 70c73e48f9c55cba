"""What is built for tests: C++ programs over the engine, and what is kept under build/."""

from __future__ import annotations

import fcntl
import importlib.util
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PROGRAMS = ROOT / "tests" / "csrc"
"""C++ programs and headers of tests."""

PARTS = {
    "gather": [],
    "free_memory": [CSRC / "drivers" / "free_memory.cpp"],
    "placement": [CSRC / "drivers" / "placement.cpp"],
}
"""Sources that a program of that name needs beside its own; any other program needs the engine."""


@cache
def build_script() -> Any:
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("pie_csrc_build", CSRC / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    parts = PARTS.get(name, script.SOURCES)
    without = [] if script.cuda_headers() else script.CUDA_SOURCES
    files = [*(file for file in parts if file not in without), PROGRAMS / f"{name}.cpp"]
    with tempfile.TemporaryDirectory() as scratch:
        unit = Path(scratch) / "all.cpp"  # In one piece: a third of the time.
        unit.write_text("".join(f'#include "{file}"\n' for file in files))
        script.build(folder / name, [unit], shared=False, sanitize=sanitize)
    return folder / name


def build_once(target: Path, make: Callable[[], object]) -> None:
    """Make ``target`` if it is not there, in one process; others that want it wait.

    Args:
        target: a file in a folder of its own.
        make: makes the folder, and puts the file there whole, by a rename.
    """
    if target.exists():
        return
    folder = target.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which may be replaced.
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            make()

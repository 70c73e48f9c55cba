"""How the native code is built, and what is made once and kept under build/."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


@cache
def build_script() -> Any:
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("pie_csrc_build", CSRC / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def compile_cpp(target: Path, source: Path, *flags: str) -> None:
    """Compile and link one C++ file; ``target`` is there whole or not at all.

    Args:
        target: file to make, with its folder.
        source: the C++ file.
        flags: for the compiler; those of the linker go behind the source.

    Raises:
        RuntimeError: there is no compiler, or it failed or warned.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(f"{source.name} needs a C++17 compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, str(source), *flags, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or done.stderr:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        made.replace(target)

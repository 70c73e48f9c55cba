"""How the native code is built, and what is made once and kept under build/."""

from __future__ import annotations

import fcntl
import importlib.util
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

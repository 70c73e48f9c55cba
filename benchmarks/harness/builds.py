"""What is built when it is needed, and kept under build/, by whichever process comes first."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path


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

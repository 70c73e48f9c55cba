"""One budget of CPU memory for all pools of a host: who takes some looks first, one at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pie_vllm.engine.host_memory import available_host_bytes
from pie_vllm.errors import TransferError

LEFT_ALONE = 128 << 20
"""Bytes of free CPU memory that nobody takes: the kernel ends processes when all is gone."""

LOCK_SECONDS = 5.0
"""Longest wait for another process that takes memory; it may be stopped while it does."""


def lock_path() -> Path:
    """The file whose lock the processes of a host share, whatever engine or user they are of."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / "pie-pool.lock"


@contextmanager
def taking(
    size: int,
    available: Callable[[], int] = available_host_bytes,
    *,
    path: Path | None = None,
    seconds: float = LOCK_SECONDS,
) -> Iterator[None]:
    """Take ``size`` bytes inside: they are free, and nobody else who asks takes them meanwhile.

    Several ranks or replicas that looked at the free memory together would take it together, and
    the kernel ends a process then.

    Args:
        size: bytes to take.
        available: returns how many bytes can be taken.
        path: path of the lock; None is ``lock_path()``.
        seconds: longest wait for the lock in seconds.

    Raises:
        TransferError: so much is not free, or somebody else does not get done.
    """
    lock = _locked(lock_path() if path is None else path, seconds)
    try:
        free = available()
        if free < size + LEFT_ALONE:
            raise TransferError(
                f"{size / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB of CPU memory are "
                f"free (system and cgroup limit), of which {LEFT_ALONE >> 20} MiB are left alone."
            )
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _locked(path: Path, seconds: float) -> int | None:
    """A descriptor that holds the lock; None where this process may not open the file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW  # Another user's file can be locked, too.
    try:
        try:
            lock = os.open(path, flags)
        except FileNotFoundError:
            lock = os.open(path, flags | os.O_CREAT, 0o644)
    except OSError:
        return None
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() < end:
                time.sleep(0.005)
                continue
            os.close(lock)
            raise TransferError(
                f"another process has held {path} for {seconds:.0f} s while it takes CPU memory."
            ) from None
        return lock

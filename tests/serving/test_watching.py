"""Negative control: what a server leaves behind is found."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from tests.serving.process import Server

LEAKY = """
import mmap, os, time
from multiprocessing import resource_tracker, shared_memory
shared = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(shared._name, "shared_memory")
descriptor = os.memfd_create("pie-device")
os.truncate(descriptor, 4096)
arena = mmap.mmap(descriptor, 4096)
if os.fork() == 0:
    time.sleep(120)
    os._exit(0)
print("ready", shared.name, flush=True)
time.sleep(120)
"""


class LeakyServer(Server):
    """Ends at SIGTERM, and leaves a child, a shared memory block and an arena."""

    def __init__(self, log: Path) -> None:
        super().__init__(Path("no-model"), [], log)
        self._command = [sys.executable, "-c", LEAKY]

    def _healthy(self) -> bool:
        return "ready" in self.text()


def test_what_a_server_leaves_is_found(tmp_path: Path) -> None:
    """A child that lives on, an entry of /dev/shm and a mapped arena each appear, by name."""
    with LeakyServer(tmp_path / "log") as server:
        server.start()
        name = server.text().split()[1]
        begin = time.monotonic()
        server.signal(signal.SIGTERM)
        ending = server.await_end(20, grace=0.5)
        Path("/dev/shm", name).unlink()
    assert ending.status == -signal.SIGTERM
    assert any("memfd_create" in title for title in ending.processes)
    assert ending.shared_memory == (name,)
    assert len(ending.arenas) == 1
    assert time.monotonic() - begin < 30

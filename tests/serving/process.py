"""A server process and everything that belongs to it, as /proc shows it.

Other servers may run on the machine at the same time, so nothing is compared before and after:
what a server holds is noted while it lives, and looked for by name or inode when it has ended.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real.server import VllmServer

START_LINE = re.compile(
    r"Pie: (?P<resident>\d+) resident blocks, (?P<pooled>\d+) pooled blocks, "
    r"ring (?P<slots>\d+) slots (?P<ring_mib>[\d.]+) MiB "
    r".*host pool up to (?P<host_gib>[\d.]+) GiB in (?P<rows>\d+) rows, "
    r"longest context served (?P<longest>\d+) tokens, driver (?P<driver>\w+)"
)
GRACE_SECONDS = 20.0
"""How long a child may outlive the server; the engine's workers poll for their parent."""

SHUTDOWN_LINES = ("[shutdown]", "processes to exit")
_SHM = re.compile(r"/dev/shm/(?P<name>[^\s/]+)$")
_MEMFD = re.compile(r"(?P<inode>\d+)\s+/memfd:pie-\S+ \(deleted\)$")


@dataclass(frozen=True)
class Usage:
    """What one process uses: private bytes, and numbers of threads and file descriptors."""

    private_bytes: int
    threads: int
    descriptors: int


@dataclass(frozen=True)
class Ending:
    """How a server ended, and what it left.

    Attributes:
        status: exit status of the process; None if it had to be killed.
        seconds: how long the process took to end.
        processes: processes of its session that outlived it by more than the grace.
        shared_memory: entries of /dev/shm that were its own.
        arenas: processes, of whatever session, that still map its device memory (a memfd).
    """

    status: int | None
    seconds: float
    processes: tuple[str, ...]
    shared_memory: tuple[str, ...]
    arenas: tuple[str, ...]

    @property
    def left(self) -> tuple[str, ...]:
        """All that should not be there."""
        return self.processes + self.shared_memory + self.arenas


def _pids() -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            yield int(entry)


def _read(pid: int, name: str) -> str:
    """A file of /proc, empty if the process has gone or belongs to somebody else."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _status(pid: int, field: str) -> str:
    found = re.search(rf"^{field}:\s+(.*)$", _read(pid, "status"), re.MULTILINE)
    return found[1] if found else ""


def session(leader: int) -> dict[int, str]:
    """Living processes of a session, by title; zombies do not live."""
    members = {}
    for pid in _pids():
        try:
            ours = os.getsid(pid) == leader
        except OSError:
            continue
        state = _status(pid, "State")
        if ours and state and not state.startswith(("Z", "X")):
            title = _read(pid, "cmdline").replace("\0", " ").strip()
            members[pid] = title or _status(pid, "Name")
    return members


def usage(pid: int) -> Usage:
    """What the process uses now.

    Private memory only: the tiers are shared mappings of a fixed size, whose pages count when
    they are touched first.
    """
    return Usage(
        private_bytes=int(_status(pid, "RssAnon").split()[0]) * 1024,
        threads=int(_status(pid, "Threads")),
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
    )


class Server(VllmServer):
    """A server whose processes, shared memory and end are watched."""

    def __init__(self, model: Path, arguments: Sequence[str], log: Path) -> None:
        super().__init__(model, arguments, log)
        self._leader = 0
        self._shm: set[str] = set()
        self._arenas: set[str] = set()

    def __enter__(self) -> Server:
        return self

    @property
    def pid(self) -> int:
        """The process that was started; leader of the session of all the others."""
        if self._process is not None:
            self._leader = self._process.pid
        return self._leader

    def child(self, title: str) -> int:
        """The only process of this server whose title has `title`."""
        found = [pid for pid, name in session(self.pid).items() if title in name]
        assert len(found) == 1, f"{title}: {session(self.pid)}"
        return found[0]

    def engine_usage(self) -> dict[str, Usage]:
        """What the scheduler's and the worker's process use now."""
        return {title: usage(self.child(title)) for title in ("VLLM::EngineCore", "VLLM::Worker")}

    def note_holdings(self) -> None:
        """Note the shared memory that the server's processes hold now."""
        for pid in session(self.pid):
            for line in _read(pid, "maps").splitlines():
                if found := _SHM.search(line):
                    self._shm.add(found["name"])
                elif found := _MEMFD.search(line):
                    self._arenas.add(found["inode"])

    @property
    def maps_an_arena(self) -> bool:
        """Whether `note_holdings` saw the device memory of the host driver."""
        return bool(self._arenas)

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to the server, or to one of its processes."""
        self.note_holdings()
        os.kill(self.pid if pid is None else pid, number)

    def await_end(self, seconds: float, grace: float = GRACE_SECONDS) -> Ending:
        """Wait until the server ends by itself, and see what is left of it."""
        assert self._process is not None
        leader, begin = self.pid, time.monotonic()
        while self._process.poll() is None and time.monotonic() - begin < seconds:
            time.sleep(0.1)
        status, took = self._process.returncode, time.monotonic() - begin
        deadline = time.monotonic() + grace
        while session(leader) and time.monotonic() < deadline:
            time.sleep(0.1)
        ending = Ending(
            status=status,
            seconds=took,
            processes=tuple(f"{pid} {title}" for pid, title in session(leader).items()),
            shared_memory=tuple(sorted(self._shm.intersection(os.listdir("/dev/shm")))),
            arenas=tuple(self._mapping_arenas()),
        )
        self.kill()
        return ending

    def kill(self) -> None:
        """End what is left of the session at once."""
        for pid in session(self.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._process is not None:
            self._process.wait()

    def _mapping_arenas(self) -> Iterator[str]:
        for pid in _pids():
            found = {match[1] for match in re.finditer(_MEMFD.pattern, _read(pid, "maps"), re.M)}
            if found & self._arenas:
                yield f"{pid} maps {sorted(found & self._arenas)}"


def tracebacks_in_service(log: str) -> list[str]:
    """Lines that begin a traceback before the server was told to end."""
    lines = log.splitlines()
    told = (n for n, line in enumerate(lines) if any(word in line for word in SHUTDOWN_LINES))
    return [line for line in lines[: next(told, len(lines))] if "Traceback" in line]


def frames_of_ours(log: str) -> list[str]:
    """Traceback lines anywhere in the log that lie in pie_vllm.

    Stock vLLM 0.32 itself logs an EngineDeadError now and then while it ends.
    """
    return [line for line in log.splitlines() if "File " in line and "/pie_vllm/" in line]

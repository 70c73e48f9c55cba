"""A `vllm serve` process: started, waited for, and always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.harness.environment import vllm_environment
from benchmarks.real.counters import parse_metrics

START_SECONDS = 600.0
STOP_SECONDS = 45.0
LOG_TAIL_LINES = 40
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""Without proxies: a proxy set for the package index must not see loopback traffic."""


class ServerError(RuntimeError):
    """The server did not start, or ended while it was needed; carries the end of its log."""


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class VllmServer:
    """A context in which a real vLLM server answers at `url`.

    The server gets a process group of its own. Leaving the context, in whatever way, sends
    SIGTERM, waits, and then kills what is left of the group. The log stays at `log`.
    """

    def __init__(self, model: Path, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.exit_status: int | None = None
        self._command = [
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            str(model),
            "--host=127.0.0.1",
            f"--port={self.port}",
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, on_wait: Callable[[float], None] = lambda _: None) -> None:
        """Start the process and wait until it is healthy; `on_wait` gets the seconds so far."""
        self.launch()
        self.await_healthy(on_wait)

    def launch(self) -> None:
        """Start the process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=vllm_environment(),
                start_new_session=True,
            )

    def await_healthy(self, on_wait: Callable[[float], None] = lambda _: None) -> None:
        """Wait until the server answers. Raises ServerError when it ended or does not."""
        assert self._process is not None
        begin = time.monotonic()
        while not self._healthy():
            seconds = time.monotonic() - begin
            if self._process.poll() is not None:
                raise ServerError(self._report(f"ended with status {self._process.returncode}"))
            if seconds > START_SECONDS:
                raise ServerError(self._report(f"did not answer within {START_SECONDS:.0f} s"))
            on_wait(seconds)
            time.sleep(0.5)

    def stop(self) -> None:
        """End the server and all its children; may be called at any time, also twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            self.exit_status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            self.exit_status = process.wait()
        end_group(process.pid)

    def metrics(self) -> dict[str, float]:
        """The server's counters now, summed over labels."""
        with _open(f"{self.url}/metrics", timeout=30) as answer:
            return parse_metrics(answer.read().decode())

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _healthy(self) -> bool:
        try:
            with _open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _report(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"the vLLM server {what}; the end of {self.log}:", *lines])


def end_group(group: int, patience: float = 10.0) -> None:
    """Wait for the last processes of a group, and kill those that stay."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return

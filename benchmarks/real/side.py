"""An engine that serves in a process of its own, and waits between the turns that it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.display import working
from benchmarks.harness.environment import vllm_environment

SCRATCH = Path("build/runs")


class Side:
    """One engine in its process: `python -m benchmarks.MODULE --serve SPEC` calls `serve`."""

    def __init__(self, module: str, name: str, spec: dict[str, Any]) -> None:
        """Start the process and wait until it is ready.

        Raises:
            RuntimeError: it ended before; names its log.
        """
        SCRATCH.mkdir(parents=True, exist_ok=True)
        path = SCRATCH / f"{module}-{name}.spec.json"
        path.write_text(json.dumps(spec))
        self._path = SCRATCH / f"{module}-{name}.log"
        self._log = self._path.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", "--serve", str(path)],
            env=vllm_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self._until("ready") is None:
            self.close()
            raise RuntimeError(f"{module} {name} did not start; see {self._path}")

    def _until(self, word: str) -> str | None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.startswith(word):
                return line[len(word) :].strip()
            self._log.write(line)
            self._log.flush()
        return None

    def turn(self, ask: Any) -> Any:
        """What `serve` was asked and answers, both as JSON; None when the process has ended."""
        assert self._process.stdin is not None
        print(json.dumps(ask), file=self._process.stdin, flush=True)
        answer = self._until("answer")
        return json.loads(answer) if answer else None

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._until("\0")  # Reads to the end: a full pipe would hold the process up.
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._log.close()


Sides = dict[str, Side]
"""Engines by name."""


@contextmanager
def sides(module: str, specs: Mapping[str, dict[str, Any]], suffix: str = "") -> Iterator[Sides]:
    """The engines of these specs by name, ended at the end, also where one does not start.

    Args:
        module: benchmark whose engines they are, as `python -m benchmarks.MODULE` names it.
        specs: settings of each engine, by its name.
        suffix: end of the names of their files.
    """
    found: Sides = {}
    try:
        with working(f"starting {len(specs)} engines"):
            for name, spec in specs.items():
                found[name] = Side(module, name + suffix, spec)
        yield found
    finally:
        for side in found.values():
            side.close()


def serve(turn: Callable[[Any], Any]) -> None:
    """In the child: answer each line of the input, until it ends or `turn` returns None."""
    print("ready", file=sys.__stderr__, flush=True)
    for line in sys.stdin:
        answer = turn(json.loads(line))
        if answer is None:
            return
        print("answer", json.dumps(answer), file=sys.__stderr__, flush=True)

"""vLLM engines in processes of their own, which answer what they are asked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

CLOSE_SECONDS = 30


class EngineError(Exception):
    """What an engine's process raised, as `Type: text`, or how it ended."""


class EngineProcess:
    """One engine: `python -m benchmarks.gpu.harness.vllm_child SPEC`.

    Args:
        spec: `llm`, the arguments of `vllm.LLM`; `pie`, those of `pie_vllm.engine_args` or None;
            `seed_lengths` of the warm-up.
        log: file for its output.
        environment: beside this process's.
    """

    def __init__(
        self, spec: Mapping[str, Any], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process; it loads the model while the caller goes on."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        path = log.with_suffix(".spec.json")
        path.write_text(json.dumps(spec))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.harness.vllm_child", str(path)],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._about: dict[str, Any] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What the engine says of itself once it is ready: blocks, runner, modes.

        Raises:
            EngineError: it did not start.
        """
        if self._about is None:
            self._about = self._answer()
        return self._about

    def ask(self, what: str, **arguments: Any) -> Any:
        """Let it do something and wait for the answer; see `vllm_child`.

        Raises:
            EngineError: it failed.
        """
        assert self.about
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise EngineError(f"the engine ended; see its log {self._log.name}") from error
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise EngineError(f"the engine ended with status {self._process.returncode}")
        found = json.loads(line)
        if "error" in found:
            raise EngineError(found["error"])
        return found["answer"]

    def tail(self, size: int = 1500) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-size:]

    def hang_up(self) -> None:
        """Let it end; does not wait for that."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """End it; kill it where it does not."""
        self.hang_up()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> EngineProcess:
        """The engine itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

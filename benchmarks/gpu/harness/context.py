"""What a stage is given."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.harness.records import Reporter

SPARE_SECONDS = 15.0
"""Before the limit, in which a stage begins nothing more; less of short limits."""

SPARE_SHARE = 0.1

PR_SET_PDEATHSIG = 1


class NotHereError(Exception):
    """The stage, or a part of it, cannot run on this machine; says why."""


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        driver: "cuda", or "host" for a dry run.
        quick: small sizes and few rounds.
        parts: parts of the stage that were asked for; all where empty.
        limit: seconds after which the stage is killed.
        deadline: when that is, of `time.monotonic`.
        scratch: folder for files.
        report: takes results.
    """

    driver: str
    quick: bool
    parts: tuple[str, ...]
    limit: float
    deadline: float
    scratch: Path
    report: Reporter

    @property
    def dry(self) -> bool:
        """Whether there is no GPU, and the script itself is what runs dry."""
        return self.driver != "cuda"

    @property
    def left(self) -> float:
        """Seconds in which more may be begun."""
        spare = min(SPARE_SECONDS, SPARE_SHARE * self.limit)
        return self.deadline - time.monotonic() - spare

    def wants(self, part: str) -> bool:
        """Whether a part was asked for."""
        return not self.parts or part in self.parts

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether something that takes so long can still be begun; notes where not."""
        if self.left >= seconds:
            return True
        self.report.note(f"no time was left for {what}")
        return False


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it has ended, however it did."""
    with contextlib.suppress(OSError, AttributeError):  # Not Linux.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

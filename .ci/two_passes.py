"""The tests in two passes: those that stand a busy machine side by side, then the others alone.

``python .ci/two_passes.py [PYTEST ARGUMENTS]``. Tests marked ``soak`` are left out. Each pass ends
with pytest's own summary; the last line adds both up. The exit status is pytest's, of the first
pass that failed.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import pytest

PASSES = (
    # A file stays together, because its tests share engines; those that take long come first
    # (tests/conftest.py).
    ("not soak and not alone", "-n2", "--dist=loadfile", "--no-loadscope-reorder"),
    ("not soak and alone",),
)
COUNTED = ("failed", "passed", "skipped", "xfailed", "xpassed", "warnings", "error")


class Totals:
    """A plugin of pytest that adds up what its summaries count."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Called by pytest before its closing line."""
        self.counts.update({key: len(terminalreporter.stats.get(key, ())) for key in COUNTED})

    def line(self, seconds: float) -> str:
        """A closing line like pytest's."""
        found = [f"{self.counts[key]} {key}" for key in COUNTED if self.counts[key]]
        return f" {', '.join(found) or 'no tests ran'} in {seconds:.2f}s ".center(80, "=")


def main(arguments: list[str]) -> int:
    """Run both passes. One may find nothing to run, where the arguments name few tests."""
    totals, begin = Totals(), time.monotonic()
    status = int(pytest.ExitCode.NO_TESTS_COLLECTED)
    for marks, *how in PASSES:
        ended = int(pytest.main(["-m", marks, *how, *arguments], plugins=[totals]))
        if ended == pytest.ExitCode.INTERRUPTED:
            return ended
        if ended != pytest.ExitCode.NO_TESTS_COLLECTED and status in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            status = ended
    print(totals.line(time.monotonic() - begin))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The totals in a server's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real.counters import last_pie_line


@pytest.mark.parametrize("words", ["none", "residents:3,deferred:1"])
def test_the_words_of_a_line_of_totals_are_no_numbers(tmp_path: Path, words: str) -> None:
    """What keeps requests waiting is left out; the last line counts."""
    log = tmp_path / "log"
    lines = [f"INFO Pie: steps={n} pooled=2 stall_seconds=0.5 head_waits={words}" for n in (1, 7)]
    log.write_text("\n".join(lines))
    assert last_pie_line(log) == {"steps": 7, "pooled": 2, "stall_seconds": 0.5}

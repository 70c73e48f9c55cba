"""Reads counters: Prometheus text of a vLLM server, and the `Pie:` lines of its log."""

from __future__ import annotations

import re
from pathlib import Path

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$")
_REASON = re.compile(r'\breason="(?P<reason>[^"]*)"')
WORDS = "head_waits"
_PIE_LINE = re.compile(r"\bPie: (?P<fields>steps=.*)$")


def parse_metrics(text: str) -> dict[str, float]:
    """Sum the samples of each metric of a Prometheus page over their labels.

    A metric with a label `reason` has the sums by reason too, as `name:reason`.
    """
    totals: dict[str, float] = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found:
            name = found["name"]
            reason = _REASON.search(found["labels"] or "")
            for key in (name, f"{name}:{reason['reason']}") if reason else (name,):
                totals[key] = totals.get(key, 0.0) + float(found["value"])
    return totals


def last_pie_line(log: Path) -> dict[str, float]:
    """Return the numbers in the last `Pie: steps=… pooled=…` line of a log, {} without one.

    What keeps requests waiting, `head_waits=residents:3` or `none`, is no number.
    """
    fields: dict[str, float] = {}
    for line in log.read_text(errors="replace").splitlines():
        found = _PIE_LINE.search(line)
        if found:
            pairs = (item.partition("=") for item in found["fields"].split())
            fields = {key: float(value) for key, mark, value in pairs if mark and key != WORDS}
    return fields

"""Outcomes of tests over pie against those over stock vLLM, and which differences are known."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

Outcomes = dict[str, list[Any]]
"""Outcome, text of the error and seconds, by test."""

PREFIX = "tests/"


def read_known(path: Path, release: str) -> dict[str, list[dict[str, Any]]]:
    """Explained differences by suite; each has ``tests``, ``modes``, ``error`` and ``why``.

    One with ``releases`` is of these releases of vLLM alone.
    """
    known: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    return {
        suite: [entry for entry in entries if release in entry.get("releases", [release])]
        for suite, entries in known.items()
    }


def differences(
    suite: str, mode: str, stock: Outcomes, pie: Outcomes, known: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Print what is known to differ from stock; returns what is not, and what is known and gone."""
    wrong = []
    entries = [entry for entry in known.get(suite, []) if mode in entry["modes"]]
    met: dict[int, int] = {}
    for test, (outcome, text, *_) in sorted(pie.items()):
        before = stock.get(test, ["absent"])[0]
        if outcome == before:
            continue
        short = test.removeprefix(PREFIX)
        fits = [i for i, e in enumerate(entries) if _meets(short, e) and e["error"] in text]
        for i in fits:
            met[i] = met.get(i, 0) + 1
        if not fits:
            line = f"{suite}/{mode}: {before} -> {outcome} {short}"
            wrong.append(f"{line}\n    NOT KNOWN: {text[:300]}")
    for i, count in met.items():
        print(f"{suite}/{mode}: {count} tests differ, as known: {entries[i]['why']}")
    ran = [test.removeprefix(PREFIX) for test in pie]
    for i, entry in enumerate(entries):
        if i not in met and any(_meets(test, entry) for test in ran):
            wrong.append(f"{suite}/{mode}: KNOWN AND GONE {entry['tests']}")
    if mode in ("idle", "pool"):  # The others run a part of the tests.
        wrong += [f"{suite}/{mode}: NOT RUN {test}" for test in sorted(stock.keys() - pie.keys())]
    return wrong


def _meets(test: str, entry: dict[str, Any]) -> bool:
    # Brackets of parameters are no character classes.
    plain = test.replace("[", "(")
    return any(fnmatch.fnmatchcase(plain, name.replace("[", "(")) for name in entry["tests"])

"""What a stage reports, one line of JSON each, so that a stage that is killed keeps its results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Reporter:
    """Writes the records of a stage as they come."""

    def __init__(self, path: Path) -> None:
        """Begin an empty file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")

    def fact(self, name: str, value: Any) -> None:
        """Something found out, such as the device's name."""
        self._write("fact", name=name, value=value)

    def row(self, table: str, /, **values: Any) -> None:
        """One more row of a table; all rows of one have the same columns."""
        self._write("row", table=table, values=values)

    def check(self, name: str, found: Any, asked: str, ok: bool, *, target: bool = False) -> None:
        """Something that must hold; where not, the stage has failed.

        Args:
            name: name of what is checked.
            found: what was measured.
            asked: in words or signs, such as `0` or `<= 1.01`.
            ok: whether it holds.
            target: a figure that is aimed at: to miss it is said, and fails nothing.
        """
        self._write("check", name=name, found=found, asked=asked, ok=bool(ok), target=target)

    def note(self, text: str) -> None:
        """Something to know beside the figures, such as what was left out and why."""
        self._write("note", text=text)

    def skip(self, text: str) -> None:
        """The stage cannot run here."""
        self._write("skip", text=text)

    def error(self, text: str) -> None:
        """The stage has failed."""
        self._write("error", text=text)

    def _write(self, kind: str, **values: Any) -> None:
        print(json.dumps({"kind": kind, **_plain(values)}, default=str), file=self._file)
        self._file.flush()


def _plain(value: Any) -> Any:
    """Numbers to six digits; None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def collect(path: Path) -> dict[str, Any]:
    """What a stage has reported so far; a last line that was cut short is left out."""
    found: dict[str, Any] = {"facts": {}, "tables": {}, "checks": [], "notes": []}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        kind = record.pop("kind")
        if kind == "fact":
            found["facts"][record["name"]] = record["value"]
        elif kind == "row":
            found["tables"].setdefault(record["table"], []).append(record["values"])
        elif kind == "check":
            found["checks"].append(record)
        elif kind == "note":
            found["notes"].append(record["text"])
        else:
            found[kind] = record["text"]
    return found


def failed_checks(found: dict[str, Any]) -> list[str]:
    """Names of the checks that do not hold, targets left out."""
    return [check["name"] for check in found["checks"] if not check["ok"] and not check["target"]]

"""Result files: a small one that is kept beside its plot, and the whole of it under build/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
DETAILS = Path("build/results")
"""Folder of the whole of the newest results, distributions and single cases included."""

LINE = 100
"""Characters; what fits on a line of so many is written on one."""

DIGITS = 5
"""Significant digits of a number in a small file: more than any machine repeats."""


def numbers_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's plain numbers, without its distributions and the counters they were made from."""
    return {key: value for key, value in run.items() if isinstance(value, int | float)}


def write_result(
    stem: Path, data: Mapping[str, Any], details: Mapping[str, Any] | None = None
) -> None:
    """Write `stem`.json, and the same with the details to a file of that name in DETAILS.

    Args:
        stem: path of the small file, without its suffix.
        data: what is kept.
        details: further entries, or fuller ones in place of those of `data`.
    """
    name = stem.with_suffix(".json").name
    write_json(DETAILS / name, {**data, **(details or {})})
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(compact(rounded(data)) + "\n")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


def read_result(stem: Path) -> dict[str, Any]:
    """What `stem`.json holds."""
    data: dict[str, Any] = json.loads(stem.with_suffix(".json").read_text())
    return data


def rounded(value: Any) -> Any:
    """The value with all its floats cut to DIGITS."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(each) for each in value]
    return value


def compact(value: Any, indent: int = 0) -> str:
    """JSON with one line for each part that fits on it, and so with differences that are short."""
    whole = json.dumps(value)
    if indent + len(whole) <= LINE or not isinstance(value, dict | list):
        return whole
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {compact(each, indent + 2)}" for k, each in value.items()]
        opening, closing = "{", "}"
    else:
        parts = [compact(each, indent + 2) for each in value]
        opening, closing = "[", "]"
    lines = f",\n{pad}".join(parts)
    return f"{opening}\n{pad}{lines}\n{' ' * indent}{closing}"

"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

DRY = "dry run: figures of this script's own machinery on a CPU, not of a GPU"


def markdown(results: dict[str, Any]) -> str:
    """All results: the machine, a table of the stages, then each stage."""
    lines = ["# GPU check", ""]
    if results["dry_run"]:
        lines += [f"**{DRY}**", ""]
    lines += table(["machine", ""], [[k, cell(v)] for k, v in results["machine"].items()])
    lines += ["", "## Stages", ""]
    rows = []
    for name, stage in results["stages"].items():
        held = sum(check["ok"] for check in stage["checks"])
        checks = f"{held} of {len(stage['checks'])}" if stage["checks"] else ""
        why = stage.get("error") or stage.get("skip") or ""
        rows.append(
            [name, f"**{stage['status']}**", f"{stage.get('seconds', 0):.0f} s", checks, cell(why)]
        )
    lines += table(["stage", "status", "time", "checks that hold", ""], rows)
    for name, stage in results["stages"].items():
        lines += _stage(name, stage)
    return "\n".join(lines) + "\n"


def _stage(name: str, stage: dict[str, Any]) -> list[str]:
    lines = ["", f"## {name}", "", stage["question"], ""]
    run = f"{stage['date']}, commit {stage['commit']}, sources {stage['sources']}"
    lines += [f"{run}, `{stage['command']}`"]
    if stage.get("error"):
        lines += ["", f"**{stage['status']}**: {cell(stage['error'])}"]
    if stage["facts"]:
        lines += ["", *table(["", ""], [[k, cell(v)] for k, v in stage["facts"].items()])]
    if stage["checks"]:
        rows = [
            [cell(c["name"]), cell(c["found"]), cell(c["asked"]), _verdict(c)]
            for c in stage["checks"]
        ]
        lines += ["", *table(["check", "found", "asked", ""], rows)]
    for title, rows_of in stage["tables"].items():
        columns = list(dict.fromkeys(key for row in rows_of for key in row))
        cells = [[cell(row.get(key, "")) for key in columns] for row in rows_of]
        lines += ["", f"### {title}", "", *table([_words(key) for key in columns], cells)]
    if stage["notes"]:
        lines += ["", *(f"- {cell(note)}" for note in stage["notes"])]
    return lines


def _verdict(check: dict[str, Any]) -> str:
    if check["ok"]:
        return "holds"
    return "missed" if check["target"] else "**does not hold**"


def _words(key: str) -> str:
    return key.replace("_", " ")


def cell(value: Any) -> str:
    """One line without characters that would end a cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    return " ".join(str(value).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]

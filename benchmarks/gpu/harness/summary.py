"""One page about a call: which stages ended how, and the figures that decide what is done next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.harness.markdown import DRY, cell, table
from benchmarks.gpu.harness.plans import Plan

LOG_LINES = 8
"""Lines of each failed stage that are shown."""

LINES_MAX = 12
"""Upper bound on the lines of missed targets, and of notes: the rest is in gpu_check.md."""

STEP_MS = 5.0
"""The step that the price of gates is told for."""

Results = dict[str, Any]
Rows = list[dict[str, Any]]


class Figure(NamedTuple):
    """Something that a call finds out.

    Attributes:
        name: in words.
        table: the beginning of its name, in whichever stage.
        value: reads the figure from the table's rows; None where they do not tell.
        least, most: what was predicted before the first run; None: nothing was.
    """

    name: str
    table: str
    value: Callable[[Rows], float | None]
    least: float | None = None
    most: float | None = None

    @property
    def predicted(self) -> str:
        """The range in words."""
        if self.least is None and self.most is None:
            return ""
        if self.most is None:
            return f">= {self.least:g}"
        return f"<= {self.most:g}" if self.least is None else f"{self.least:g} to {self.most:g}"

    def verdict(self, value: float | None) -> str:
        """Whether the value is as predicted."""
        if value is None or not self.predicted:
            return ""
        above = self.least is None or value >= self.least
        below = self.most is None or value <= self.most
        return "as predicted" if above and below else "**surprise**"


def least_of(key: str, **wanted: Any) -> Callable[[Rows], float | None]:
    """The least of a column, of the rows that have these values."""

    def value(rows: Rows) -> float | None:
        found = [r[key] for r in rows if all(r.get(k) == v for k, v in wanted.items())]
        return min((v for v in found if v is not None), default=None)

    return value


def merged(rows: Rows) -> float | None:
    """The least share of the peak of plans whose runs merge."""
    return least_of("share_of_peak")([row for row in rows if row["longest_run"] > 1])


def gates_alone(rows: Rows) -> float | None:
    """What a step of `STEP_MS` would take beside one without gates; the worst of all settings."""
    alone = [row for row in rows if row["share_of_link"] == 0]
    added = [row["step_with_loads_ms"] - row["step_ms"] for row in alone]
    return 1 + max(added) / STEP_MS if added else None


def worst(key: str, **wanted: Any) -> Callable[[Rows], float | None]:
    """The greatest of a column, of the rows that have these values."""

    def value(rows: Rows) -> float | None:
        found = [r.get(key) for r in rows if all(r.get(k) == v for k, v in wanted.items())]
        return max((v for v in found if v is not None), default=None)

    return value


FIGURES = (
    Figure("merged runs, share of the peak, least", "real plans", merged, 0.95),
    Figure(
        "single pages of 64 KiB, share of the peak",
        "real plans",
        least_of("share_of_peak", longest_run=1, page_KiB=64),
        0.83,
        0.93,
    ),
    Figure("gates alone, beside a step of 5 ms", "steps with loads", gates_alone, 1.02, 1.04),
    Figure(
        "a graph's loads at half of the link, beside the graph alone",
        "engine: steps that load",
        worst("in_graph_ratio", share_of_link=0.5),
        1.03,
        1.15,
    ),
    Figure(
        "idle graph with copies, beside one without", "engine: idle", worst("ratio"), 1.0, 1.005
    ),
    Figure(
        "device memory that a GiB of pool takes, MiB",
        "device memory of the pool",
        worst("device_MiB_per_GiB"),
        0.0,
        2.0,
    ),
    Figure(
        "a small input copy beside loads, us, the head alone first",
        "small copies",
        worst("median_us", head_first=True, prefer_overlap=True),
    ),
    Figure(
        "the same, all first layers at once",
        "small copies",
        worst("median_us", head_first=False, prefer_overlap=True),
    ),
    *(
        Figure(
            f"compute beside the gather kernel of {ctas} CTAs, slowdown",
            "gather kernel: compute beside it",
            worst("slowdown", ctas=ctas),
        )
        for ctas in (1, 2, 4, 8)
    ),
)


def summary(plan: Plan, keys: Sequence[str], results: Results) -> str:
    """The page.

    Args:
        plan: stages of the call.
        keys: keys of its stages among the results.
        results: results by key, as far as there are any.
    """
    stages = {key: results["stages"][key] for key in keys if key in results["stages"]}
    passed = sum(stage["status"] == "passed" for stage in stages.values())
    lines = [f"# Plan {plan.name}: {passed} of {len(keys)} stages passed", "", plan.question, ""]
    if results["dry_run"]:
        lines += [f"**{DRY}**", ""]
    lines += [", ".join(f"{k}: {cell(v)}" for k, v in results["machine"].items()), ""]
    if stages:
        last = list(stages.values())[-1]
        lines += [f"{last['date']}, commit {last['commit']}, `{last['command']}`", ""]
    lines += table(("stage", "status", "time, s", "checks that hold", ""), stage_rows(keys, stages))
    lines += ["", "## Figures", ""]
    lines += table(("figure", "predicted", "found", ""), figure_rows(stages))
    lines += section("What does not hold", list(wrong_checks(stages, target=False)))
    lines += section("Targets missed", list(wrong_checks(stages, target=True)))
    lines += section("Notes", [f"{k}: {cell(n)}" for k, s in stages.items() for n in s["notes"]])
    for key, stage in stages.items():
        tail = stage.get("log", "").strip().splitlines()[-LOG_LINES:]
        if tail:
            lines += ["", f"## Log of {key}", "", "```", *tail, "```"]
    return "\n".join(lines) + "\n"


def stage_rows(keys: Sequence[str], stages: Results) -> Iterator[Sequence[str]]:
    """Each stage of the plan, those not reached as well."""
    for key in keys:
        stage = stages.get(key)
        if stage is None:
            yield (key, "not reached", "", "", "")
            continue
        held = f"{sum(c['ok'] for c in stage['checks'])} of {len(stage['checks'])}"
        seconds = f"{stage.get('seconds', 0):.0f} of {stage.get('limit', 0):.0f}"
        why = cell(stage.get("error") or stage.get("skip") or "")
        yield (key, f"**{stage['status']}**", seconds, held if stage["checks"] else "", why)


def figure_rows(stages: Results) -> Iterator[Sequence[str]]:
    """Each figure; those that no stage told have a dash."""
    for figure in FIGURES:
        rows = [
            row
            for stage in stages.values()
            for name, found in stage["tables"].items()
            if name.startswith(figure.table)
            for row in found
        ]
        value = figure.value(rows) if rows else None
        yield (figure.name, figure.predicted, cell(value), figure.verdict(value))


def wrong_checks(stages: Results, target: bool) -> Iterator[str]:
    """Checks that do not hold, or targets that were missed."""
    for key, stage in stages.items():
        for check in stage["checks"]:
            if not check["ok"] and check["target"] == target:
                found, asked = cell(check["found"]), cell(check["asked"])
                yield f"{key}: {cell(check['name'])}: {found}, asked {asked}"


def section(title: str, points: Sequence[str]) -> list[str]:
    """A list with its title; nothing for none."""
    if not points:
        return []
    more = [f"- and {len(points) - LINES_MAX} more"] if len(points) > LINES_MAX else []
    return ["", f"## {title}", "", *(f"- {point}" for point in points[:LINES_MAX]), *more]

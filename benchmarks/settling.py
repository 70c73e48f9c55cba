"""Does the decider settle in 50 steps after the load doubles, the link halves, long prompts come?

In simulation, on a device whose link brings 180 blocks in a step of 19 ms: several random traces
of each shift. A trace has settled if any 50 steps that begin 50 or more after the shift have a
mean limit within a fifth of the long run's, and a stall within 1.1 times the target.

    python -m benchmarks.settling [--seeds 10]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.display import table, working
from benchmarks.harness.drawing import drawing
from benchmarks.harness.machine import facts
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result
from benchmarks.harness.stats import spread
from benchmarks.simulated.shifts import (
    BEYOND,
    NAMES,
    SETTLE,
    first_after,
    mean_limit,
    settling,
    shift,
    stall_share,
    tokens_per_second,
)
from pie_vllm.simulation.traces import Outcome

SHIFTS = (*NAMES, BEYOND)

SHOWN = range(-150, 300)
"""Steps around the shift that the plot shows."""
WINDOW = 20
"""Steps of the running means in the plot."""

FIGURES = {
    "limit_before": ("limit before", 0),
    "limit": ("limit in the long run", 0),
    "least": ("least of it, settled", 2),
    "most": ("greatest of it, settled", 2),
    "first_stall": (f"stall, first {SETTLE} steps", 4),
    "stall": ("greatest stall, settled", 4),
    "tok_s_before": ("tokens/s before", 0),
    "tok_s_after": ("tokens/s in the long run", 0),
}
"""Figures of a trace: their words in the table, and digits after the point."""


def play(name: str, seed: int) -> tuple[dict[str, Any], Outcome]:
    """One shift: how it settled, with means before it and in the long run."""
    outcome = shift(name, seed).play()
    first = first_after(outcome)
    found = settling(outcome)
    before = range(first - 100, first)
    return {
        "seed": seed,
        "reached": found.reached,
        "limit_before": mean_limit(outcome, before),
        "tok_s_before": tokens_per_second(outcome, before),
        "tok_s_after": tokens_per_second(outcome, range(first + 100, first + 300)),
        **asdict(found),
    }, outcome


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many traces of a shift there are and settled; median and extremes of their figures."""
    spreads = {key: spread([case[key] for case in cases]).as_dict() for key in FIGURES}
    return {"traces": len(cases), "settled": sum(case["reached"] for case in cases), **spreads}


def plot(path: Path, outcomes: dict[str, Outcome]) -> None:
    """Limit, stall and throughput over time, a row for each shift, one trace each."""
    title = f"Shifts of load and link, simulated; running means of {WINDOW} steps"
    with drawing(path, title, (8, 10), len(outcomes), 3, sharex=True, sharey="col") as axes:
        for row, (name, outcome) in enumerate(outcomes.items()):
            first = first_after(outcome)
            recent = {i: range(first + i - WINDOW + 1, first + i + 1) for i in SHOWN}
            shown = (
                (
                    "admission limit, blocks",
                    [outcome.decisions[first + i].pooled_admission_max for i in SHOWN],
                ),
                ("stall, %", [100 * stall_share(outcome, recent[i]) for i in SHOWN]),
                ("tokens/s", [tokens_per_second(outcome, recent[i]) for i in SHOWN]),
            )
            for axis, (label, values) in zip(axes[row], shown, strict=True):
                axis.plot(list(SHOWN), values, color="tab:orange")
                axis.axvline(0, color="black", linewidth=1)
                axis.axvline(SETTLE, color="tab:gray", linestyle=":")
                axis.set_ylim(bottom=0)
                axis.set_title(label if not row else "")
                if row == len(outcomes) - 1:
                    axis.set_xlabel("steps after the shift")
            axes[row, 0].set_ylabel(name)
            axes[row, 1].axhline(1.0, color="tab:gray", linestyle="--")


def main() -> None:
    """The command line."""
    parser = plain_parser("settling", __doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "settling")
    args = parser.parse_args()
    with working(f"{len(SHIFTS)} shifts, {args.seeds} traces each") as task:
        cases: dict[str, list[dict[str, Any]]] = {name: [] for name in SHIFTS}
        shown: dict[str, Outcome] = {}
        for name in SHIFTS:
            for seed in range(args.seeds):
                found, outcome = play(name, seed)
                cases[name].append(found)
                shown.setdefault(name, outcome)
                task.note(f"{name}, trace {seed + 1}")

    data = {name: summary(found) for name, found in cases.items()}
    rows = [["settled", *(f"{one['settled']} of {args.seeds}" for one in data.values())]]
    for key, (label, digits) in FIGURES.items():
        cells = [spread([case[key] for case in found]).text(digits) for found in cases.values()]
        rows.append([label, *cells])
    table(f"Settled after {SETTLE} steps", ["", *SHIFTS], rows)
    write_result(args.output, {"machine": facts(), "shifts": data}, {"cases": cases})
    plot(args.output.with_suffix(".png"), shown)


if __name__ == "__main__":
    main()

"""Does the decider settle in 50 steps after the load doubles, the link halves, long prompts come?

In simulation, on a device whose link brings 180 blocks in a step of 19 ms: several random traces
of each shift. Settled is, of any 50 steps that begin 50 or more after the shift: the mean limit is
within a fifth of the long run's, and the stall within 1.1 times the target.

    python -m benchmarks.settling [--seeds 10]
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.display import table, working
from benchmarks.harness.drawing import drawing
from benchmarks.harness.machine import RESULTS, facts, write_json
from benchmarks.harness.options import plain_parser
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


def plot(path: Path, outcomes: dict[str, Outcome]) -> None:
    """Limit, stall and throughput over time, a column for each shift, one trace each."""
    title = f"Shifts of load and link, simulated; running means of {WINDOW} steps"
    shared = {"sharex": True, "sharey": "row"}
    with drawing(path, title, (16, 8), 3, len(outcomes), **shared) as axes:
        for column, (name, outcome) in enumerate(outcomes.items()):
            first = first_after(outcome)
            recent = {i: range(first + i - WINDOW + 1, first + i + 1) for i in SHOWN}
            rows = (
                (
                    "admission limit, blocks",
                    [outcome.decisions[first + i].pooled_admission_max for i in SHOWN],
                ),
                ("stall, %", [100 * stall_share(outcome, recent[i]) for i in SHOWN]),
                ("tokens/s", [tokens_per_second(outcome, recent[i]) for i in SHOWN]),
            )
            for axis, (label, values) in zip(axes[:, column], rows, strict=True):
                axis.plot(list(SHOWN), values, color="tab:orange")
                axis.axvline(0, color="black", linewidth=1)
                axis.axvline(SETTLE, color="tab:gray", linestyle=":")
                axis.set_ylim(bottom=0)
                if not column:
                    axis.set_ylabel(label)
            axes[1, column].axhline(1.0, color="tab:gray", linestyle="--")
            axes[0, column].set_title(name)
            axes[2, column].set_xlabel("steps after the shift")


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

    def cell(name: str, key: str, digits: int) -> str:
        return spread([case[key] for case in cases[name]]).text(digits)

    keys = (
        ("limit_before", "limit before", 0),
        ("limit", "limit in the long run", 0),
        ("least", "least of it, settled", 2),
        ("most", "most of it, settled", 2),
        ("first_stall", f"stall, first {SETTLE} steps", 4),
        ("stall", "most stall, settled", 4),
        ("tok_s_before", "tokens/s before", 0),
        ("tok_s_after", "tokens/s in the long run", 0),
    )
    rows = [[label, *(cell(name, key, digits) for name in SHIFTS)] for key, label, digits in keys]
    settled = [f"{sum(c['reached'] for c in cases[name])} of {args.seeds}" for name in SHIFTS]
    table(f"Settled after {SETTLE} steps", ["", *SHIFTS], [["settled", *settled], *rows])
    write_json(args.output.with_suffix(".json"), {"facts": facts(), "shifts": cases})
    plot(args.output.with_suffix(".png"), shown)


if __name__ == "__main__":
    main()

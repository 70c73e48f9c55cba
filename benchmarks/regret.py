"""How far from the best static admission limit is the decider, and how far above stock vLLM?

In simulation: random machines and traces, each played with the decider, with its admission limit
fixed at each of several shares of the window, and as stock vLLM, with and without the ring's bytes.
Then other machines, whose loads slow the compute beside them and whose steps scatter.

And with parked KV: traces with preemption and with chats that come back, each played with the
decider's choice whether to restore or to compute, with either fixed, without parking, and as stock
vLLM with its prefix cache and the ring's bytes.

    python -m benchmarks.regret [--cases 200] [--contended 100] [--returning 50]
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.display import console, working
from benchmarks.harness.machine import facts
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, rounded, write_result
from benchmarks.simulated.plays import play, play_returning
from benchmarks.simulated.regret_report import plot, summaries


def main() -> None:
    """The command line."""
    parser = plain_parser("regret", __doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--contended", type=int, default=100)
    parser.add_argument("--returning", type=int, default=50)
    parser.add_argument("--output", type=Path, default=RESULTS / "regret")
    args = parser.parse_args()
    plays: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
        "plain": (partial(play, contended=False), args.cases),
        "contended": (partial(play, contended=True), args.contended),
        "returning": (play_returning, args.returning),
    }
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in plays}
    with (
        working(f"{sum(count for _, count in plays.values())} cases") as task,
        ProcessPoolExecutor() as processes,
    ):
        for kind, (run, count) in plays.items():
            for case in processes.map(run, range(count)):
                found[kind].append(case)
                task.note(f"{kind} {len(found[kind])}")
    summary = summaries(found)
    for kind, figures in summary.items():
        for name, figure in figures.items():
            console.print(f"{kind}: {name}", rounded(figure))
    write_result(args.output, {"machine": facts(), "summary": summary}, {"cases": found})
    plot(args.output.with_suffix(".png"), found)


if __name__ == "__main__":
    main()

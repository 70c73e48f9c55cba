"""How far from the best static admission limit is the decider, and how far above stock vLLM?

In simulation: random machines and traces, each played with the decider, with its admission limit
fixed at each of several shares of the window, and as stock vLLM, with and without the ring's bytes.
Then other machines, whose loads slow the compute beside them and whose steps scatter.

    python -m benchmarks.regret [--cases 200] [--contended 100]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.cases import limit_at, random_case, stock
from benchmarks.harness.display import console, working
from benchmarks.harness.drawing import drawing
from benchmarks.harness.machine import RESULTS, facts, write_json
from benchmarks.harness.options import plain_parser
from benchmarks.harness.stats import spread
from pie_vllm.policy.decider import Decider
from pie_vllm.policy.traces import slowdown

SUMMED = ("regret", "to_stock", "to_stock_with_ring", "stall_share", "slowdown")
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def play(seed: int, *, contended: bool) -> dict[str, Any]:
    """One case; throughputs in tokens per second."""
    case = random_case(seed, contended=contended)

    def throughput(decider: Decider) -> float:
        return case.simulation(decider).run().throughput

    pie = case.simulation(case.decider()).run()
    limits = {share: throughput(limit_at(case, share)) for share in SHARES}
    best = max(limits, key=limits.__getitem__)
    plain, equal = (stock(case, with_ring=ring) for ring in (False, True))
    return {
        "seed": seed,
        "link_gb_s": case.profile.link / 1e9,
        "tok_s": pie.throughput,
        "best_limit": best,
        "regret": 1 - pie.throughput / limits[best],
        "to_stock": pie.throughput / plain.throughput,
        "to_stock_with_ring": pie.throughput / equal.throughput,
        "stall_share": pie.stall_seconds / pie.seconds,
        "slowdown": slowdown(pie.times),
        "preemptions": pie.preemptions,
        "stock_preemptions": equal.preemptions,
        "left_out": pie.left_out,
    }


def plot(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Regrets as a histogram; throughput against stock by the speed of the link."""
    total = sum(len(cases) for cases in found.values())
    title = f"{total} random machines and traces, simulated"
    colors = dict(zip(found, ("tab:orange", "tab:blue"), strict=True))
    with drawing(path, title, (11, 4.5), 1, 2) as (left, right):
        for kind, cases in found.items():
            regrets = [100 * case["regret"] for case in cases]
            left.hist(regrets, bins=40, color=colors[kind], alpha=0.6, label=kind)
            links = [case["link_gb_s"] for case in cases]
            ratios = [case["to_stock_with_ring"] for case in cases]
            right.semilogx(links, ratios, "o", color=colors[kind], alpha=0.6)
        left.set_xlabel("regret against the best static limit, %")
        left.set_ylabel("cases")
        left.legend()
        right.axhline(1.0, color="tab:gray", linestyle="--")
        right.set_xlabel("link, GB/s")
        right.set_ylabel("throughput of pie / stock, equal device bytes")


def main() -> None:
    """The command line."""
    parser = plain_parser("regret", __doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--contended", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS / "regret")
    args = parser.parse_args()
    counts = {"plain": args.cases, "contended": args.contended}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in counts}
    with (
        working(f"{sum(counts.values())} cases") as task,
        ProcessPoolExecutor() as processes,
    ):
        for kind, count in counts.items():
            run = partial(play, contended=kind == "contended")
            for case in processes.map(run, range(count)):
                found[kind].append(case)
                task.note(f"{kind} {len(found[kind])}")
    summary = {
        kind: {key: spread([case[key] for case in cases]).as_dict() for key in SUMMED}
        for kind, cases in found.items()
        if cases
    }
    for kind, keys in summary.items():
        for key, values in keys.items():
            console.print(kind, key, {name: round(value, 4) for name, value in values.items()})
    write_json(
        args.output.with_suffix(".json"), {"facts": facts(), "summary": summary, "cases": found}
    )
    plot(args.output.with_suffix(".png"), found)


if __name__ == "__main__":
    main()

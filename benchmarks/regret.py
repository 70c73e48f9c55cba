"""How far from the best static admission limit is the decider, and how far above stock vLLM?

In simulation: random machines and traces, each played with the decider, with its admission limit
fixed at each of several shares of the window, and as stock vLLM, with and without the ring's bytes.

    python -m benchmarks.regret [--cases 200]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.cases import limit_at, random_case, stock
from benchmarks.harness.display import console, working
from benchmarks.harness.drawing import drawing
from benchmarks.harness.machine import RESULTS, facts, write_json
from benchmarks.harness.options import plain_parser
from benchmarks.harness.stats import spread
from pie_vllm.policy.decider import Decider
from pie_vllm.policy.simulator import Simulation

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def play(seed: int) -> dict[str, Any]:
    """One case; throughputs in tokens per second."""
    case = random_case(seed)

    def throughput(decider: Decider) -> float:
        return Simulation(case.geometry, case.profile, case.jobs, decider).run().throughput

    pie = Simulation(case.geometry, case.profile, case.jobs, case.decider()).run()
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
        "preemptions": pie.preemptions,
        "stock_preemptions": equal.preemptions,
        "left_out": pie.left_out,
    }


def plot(path: Path, cases: list[dict[str, Any]]) -> None:
    """Regrets as a histogram; throughput against stock by the speed of the link."""
    title = f"{len(cases)} random machines and traces, simulated"
    with drawing(path, title, (11, 4.5), 1, 2) as (left, right):
        left.hist([100 * case["regret"] for case in cases], bins=40, color="tab:orange")
        left.set_xlabel("regret against the best static limit, %")
        left.set_ylabel("cases")
        links = [case["link_gb_s"] for case in cases]
        right.semilogx(
            links, [case["to_stock_with_ring"] for case in cases], "o", color="tab:orange"
        )
        right.axhline(1.0, color="tab:gray", linestyle="--")
        right.set_xlabel("link, GB/s")
        right.set_ylabel("throughput of pie / stock, equal device bytes")


def main() -> None:
    """The command line."""
    parser = plain_parser("regret", __doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS / "regret")
    args = parser.parse_args()
    with working(f"{args.cases} cases") as task:
        cases = []
        for seed in range(args.cases):
            cases.append(play(seed))
            task.note(f"{seed + 1}")
    summary = {
        key: spread([case[key] for case in cases]).as_dict()
        for key in ("regret", "to_stock", "to_stock_with_ring", "stall_share")
    }
    for key, values in summary.items():
        console.print(key, {name: round(value, 4) for name, value in values.items()})
    write_json(
        args.output.with_suffix(".json"), {"facts": facts(), "summary": summary, "cases": cases}
    )
    plot(args.output.with_suffix(".png"), cases)


if __name__ == "__main__":
    main()

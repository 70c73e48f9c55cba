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

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.display import console, working
from benchmarks.harness.drawing import drawing
from benchmarks.harness.machine import RESULTS, facts, write_json
from benchmarks.harness.options import plain_parser
from benchmarks.harness.stats import spread
from benchmarks.simulated.cases import BLOCK_TOKENS, limit_at, random_case, stock
from benchmarks.simulated.returning import always, returning_case
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.traces import slowdown

LIMITS = ("regret", "to_stock", "to_stock_with_ring", "stall_share", "slowdown")
RESTORES = (
    "regret",
    "to_always",
    "to_never",
    "to_parking_off",
    "to_stock_with_ring",
    "prompts_to_parking_off",
    "prompts_to_stock",
    "ttft_to_parking_off",
    "ttft_to_stock",
    "recomputed_share",
    "stall_share",
)
SUMMED = {"plain": LIMITS, "contended": LIMITS, "returning": RESTORES}
"""Of each kind of cases, the figures to summarize."""
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


def play_returning(seed: int) -> dict[str, Any]:
    """One case with parked KV; throughputs in tokens per second."""
    case = returning_case(seed)
    profile = case.profile
    pie, kept, never = (
        case.simulation(decider).run()
        for decider in (case.decider(), always(case, restores=True), always(case, restores=False))
    )
    without = replace(case, parking=None)
    off = without.simulation(without.decider()).run()
    equal = stock(case, with_ring=True)
    compute = BLOCK_TOKENS * profile.per_prompt_token
    return {
        "seed": seed,
        "link_gb_s": profile.link / 1e9,
        "compute_to_restore": compute * profile.link / case.geometry.row_bytes,
        "tok_s": pie.throughput,
        "best_fixed": "always" if kept.throughput > never.throughput else "never",
        "regret": 1 - pie.throughput / max(kept.throughput, never.throughput),
        "to_always": pie.throughput / kept.throughput,
        "to_never": pie.throughput / never.throughput,
        "to_parking_off": pie.throughput / off.throughput,
        "to_stock_with_ring": pie.throughput / equal.throughput,
        "prompts_to_parking_off": pie.prompt_tokens / off.prompt_tokens,
        "prompts_to_stock": pie.prompt_tokens / equal.prompt_tokens,
        "ttft_to_parking_off": median(pie.first_tokens) / median(off.first_tokens),
        "ttft_to_stock": median(pie.first_tokens) / median(equal.first_tokens),
        "recomputed_share": pie.recomputed_tokens / pie.prompt_tokens,
        "stall_share": pie.stall_seconds / pie.seconds,
        "preemptions": pie.preemptions,
        "stock_preemptions": equal.preemptions,
        "recomputed": pie.recomputed_tokens,
        "off_recomputed": off.recomputed_tokens,
        "stock_recomputed": equal.recomputed_tokens,
        "parked": pie.parked,
        "restored": pie.restored,
        "lost": pie.lost,
    }


def plot(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Regrets as a histogram; throughput against others by the speed of the link."""
    total = sum(len(cases) for cases in found.values())
    title = f"{total} random machines and traces, simulated"
    colors = dict(zip(found, ("tab:orange", "tab:blue", "tab:green"), strict=True))
    with drawing(path, title, (16, 4.5), 1, 3) as (left, middle, right):
        for kind, cases in found.items():
            regrets = [100 * case["regret"] for case in cases]
            left.hist(regrets, bins=40, color=colors[kind], alpha=0.6, label=kind)
            _by_link(middle, cases, "to_stock_with_ring", colors[kind], kind)
        left.set_xlabel("regret against the best static limit; returning: choice to restore, %")
        left.set_ylabel("cases")
        left.legend()
        middle.set_ylabel("throughput of pie / stock, equal device bytes")
        parked = found["returning"]
        _by_link(right, parked, "to_parking_off", "tab:green", "throughput")
        _by_link(right, parked, "prompts_to_parking_off", "tab:purple", "prompt tokens computed")
        _by_link(right, parked, "ttft_to_parking_off", "tab:gray", "time to first token, median")
        right.set_ylabel("returning: with parking / without")
        right.legend()


def _by_link(
    axes: Any, cases: Sequence[Mapping[str, Any]], key: str, color: str, label: str
) -> None:
    links = [case["link_gb_s"] for case in cases]
    axes.semilogx(links, [case[key] for case in cases], "o", color=color, alpha=0.6, label=label)
    axes.axhline(1.0, color="tab:gray", linestyle="--")
    axes.set_xlabel("link, GB/s")


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
    summary = {
        kind: {key: spread([case[key] for case in cases]).as_dict() for key in SUMMED[kind]}
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

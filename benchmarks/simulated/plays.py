"""Plays a random case with the decider, with each of its choices fixed, and as stock vLLM."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.simulated.cases import BLOCK_TOKENS, limit_at, random_case, stock
from benchmarks.simulated.returning import always, returning_case
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.traces import slowdown

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Fixed admission limits that are tried, as shares of the window."""


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

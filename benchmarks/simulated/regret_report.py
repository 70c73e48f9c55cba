"""Sums up and draws the cases of `benchmarks.regret`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.drawing import drawing
from benchmarks.harness.stats import spread

BINS = [0.5 * half for half in range(-12, 61)]
"""Edges of the histogram of regrets, in percent; what lies beyond counts in the outermost."""

Cases = Sequence[Mapping[str, Any]]

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
SUMMED = (
    "recomputed",
    "off_recomputed",
    "stock_recomputed",
    "preemptions",
    "stock_preemptions",
)

WORSE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "regret above 10 %": lambda case: case["regret"] > 0.10,
    "below 0.98 of stock with the same residents": lambda case: case["to_stock"] < 0.98,
    "slowdown above 1.2 %": lambda case: case["slowdown"] > 0.012,
}
"""What no case of an admission limit should be, by name; cases that are so are counted."""


def summary_of(cases: Cases, keys: Sequence[str]) -> dict[str, Any]:
    """The number of cases, and median and extremes of each of their figures."""
    spreads = {key: spread([case[key] for case in cases]).as_dict() for key in keys}
    return {"cases": len(cases), **spreads}


def limits_summary(cases: Cases) -> dict[str, Any]:
    """Summary of cases in which admission limits were compared."""
    worse = {name: sum(map(is_worse, cases)) for name, is_worse in WORSE.items()}
    return summary_of(cases, LIMITS) | worse


def restores_summary(cases: Cases) -> dict[str, Any]:
    """Summary of cases in which restoring was compared with computing again."""
    sums = {f"{key}, sum": sum(case[key] for case in cases) for key in SUMMED}
    return summary_of(cases, RESTORES) | sums


def summaries(found: Mapping[str, Cases]) -> dict[str, dict[str, Any]]:
    """Summary of each kind of cases; of those that return, apart by whether the link pays."""
    data = {kind: limits_summary(found[kind]) for kind in ("plain", "contended") if found[kind]}
    faster = [case for case in found["returning"] if case["compute_to_restore"] >= 1]
    slower = [case for case in found["returning"] if case["compute_to_restore"] < 1]
    for name, cases in (("faster than compute", faster), ("slower", slower)):
        if cases:
            data[f"returning, link {name}"] = restores_summary(cases)
    return data


def plot(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Regrets as a histogram; throughput against others by the speed of the link."""
    total = sum(len(cases) for cases in found.values())
    title = f"{total} random machines and traces, simulated"
    colors = dict(zip(found, ("tab:orange", "tab:blue", "tab:green"), strict=True))
    with drawing(path, title, (8, 9), 3) as (top, middle, bottom):
        for kind, cases in found.items():
            regrets = [min(max(100 * case["regret"], BINS[0]), BINS[-1]) for case in cases]
            top.hist(regrets, bins=BINS, color=colors[kind], alpha=0.6, label=kind)
            _by_link(middle, cases, "to_stock_with_ring", colors[kind], kind)
        top.set_xlabel(
            "regret, % (against the best fixed limit; returning: the better fixed choice)"
        )
        top.set_ylabel("cases")
        top.legend()
        middle.set_ylabel("throughput, pie / stock")
        parked = found["returning"]
        _by_link(bottom, parked, "to_parking_off", "tab:green", "throughput")
        _by_link(bottom, parked, "prompts_to_parking_off", "tab:purple", "prompt tokens computed")
        _by_link(bottom, parked, "ttft_to_parking_off", "tab:gray", "time to first token, median")
        bottom.set_ylabel("parking / without")
        bottom.legend()


def _by_link(
    axes: Any, cases: Sequence[Mapping[str, Any]], key: str, color: str, label: str
) -> None:
    links = [case["link_gb_s"] for case in cases]
    axes.semilogx(links, [case[key] for case in cases], "o", color=color, alpha=0.6, label=label)
    axes.axhline(1.0, color="tab:gray", linestyle="--")
    axes.set_xlabel("link, GB/s")

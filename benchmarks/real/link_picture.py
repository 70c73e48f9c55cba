"""The plot of `benchmarks.link_speeds`: throughput, stall and gaps by the speed of the link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.drawing import COLORS, drawing
from benchmarks.harness.rounds import Figures, column, in_all
from benchmarks.harness.stats import spread

STOCK = ("stock_equal", "stock_all")
GAPS = (
    ("itl_pooled", "some KV pooled", COLORS["pooled"]),
    ("itl_resident", "all KV on the device", COLORS["device"]),
)
"""Figure, kind of the requests whose tokens it times, and its colour."""

Speeds = Mapping[str, Sequence[Figures]]
"""Runs of pie by the speed of the link."""


def plot(path: Path, title: str, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Draw throughput over the full width; below it the stall, and the gaps between tokens."""
    speeds = {name.removeprefix("pie_"): runs for name, runs in figures.items() if "pie_" in name}
    mosaic = [["tokens", "tokens"], ["stall", "gaps"]]
    with drawing(path, title, (8, 7.5), mosaic=mosaic) as axes:
        draw_throughput(axes["tokens"], speeds, figures)
        draw_stall(axes["stall"], speeds)
        draw_gaps(axes["gaps"], speeds, figures)
        for each in axes.values():
            each.set_xticks(range(len(speeds)), list(speeds))
            each.set_xlabel("link, GB/s in each direction")
            each.set_ylim(bottom=0)


def medians(speeds: Speeds, key: str) -> list[float]:
    """The median of a figure at each speed; not a number where a run lacks it."""
    return [
        spread(column(runs, key)).median if in_all(runs, key) else float("nan")
        for runs in speeds.values()
    ]


def draw_throughput(axes: Any, speeds: Speeds, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Tokens per second of pie, every run a dot, between both kinds of stock vLLM."""
    places = range(len(speeds))
    axes.plot(places, medians(speeds, "tok_s"), color=COLORS["pie"], label="pie, median")
    for place, runs in zip(places, speeds.values(), strict=True):
        values = column(runs, "tok_s")
        axes.plot([place] * len(values), values, "k.", markersize=6)
    if all(in_all(runs, "simulated_tok_s") for runs in speeds.values()):
        said = medians(speeds, "simulated_tok_s")
        axes.plot(places, said, color="tab:green", linestyle=":", label="pie, simulated")
    for name, label in zip(STOCK, ("same device bytes", "memory for all"), strict=True):
        if name in figures:
            level = spread(column(figures[name], "tok_s")).median
            axes.axhline(level, color=COLORS[name], linestyle="--", label=f"stock, {label}")
    axes.set_ylabel("tokens/s")
    axes.legend(loc="lower right", ncols=2)


def draw_stall(axes: Any, speeds: Speeds) -> None:
    """Share of the time in which the compute waited for copies."""
    shares = [100 * share for share in medians(speeds, "stall_share")]
    axes.bar(range(len(speeds)), shares, color=COLORS["pie"])
    axes.set_ylabel("waiting for copies, % of the time")


def draw_gaps(axes: Any, speeds: Speeds, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Time between tokens, p50 solid and p99 dashed, by whether the request has pooled KV."""
    for percent, style in ((50, "-"), (99, "--")):
        for key, kind, color in GAPS:
            values = medians(speeds, f"{key}_p{percent}_ms")
            label = kind if percent == 50 else None
            axes.plot(range(len(speeds)), values, style, color=color, marker="o", label=label)
        if "stock_equal" in figures:
            level = spread(column(figures["stock_equal"], f"itl_p{percent}_ms")).median
            label = "stock, same bytes" if percent == 50 else None
            axes.axhline(level, color=COLORS["stock_equal"], linestyle=style, label=label)
    axes.set_ylabel("gap between tokens, ms")
    axes.set_title("p50 solid, p99 dashed")
    axes.legend(loc="lower right", fontsize="small")

"""Prints, plots and stores what rounds of runs showed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.display import say_written, table
from benchmarks.harness.drawing import drawing
from benchmarks.harness.machine import facts
from benchmarks.harness.result_file import numbers_of, read_result, write_result
from benchmarks.harness.rounds import Figures, Question, answers, column, in_all, summarize
from benchmarks.harness.stats import spread

FIGURES = (
    ("tok_s", "tokens/s", 0),
    ("simulated_tok_s", "simulated tokens/s", 0),
    ("to_simulated", "real / simulated", 3),
    ("ttft_p50_ms", "TTFT p50 ms", 0),
    ("ttft_p99_ms", "TTFT p99 ms", 0),
    ("tpot_p50_ms", "TPOT p50 ms", 1),
    ("tpot_p99_ms", "TPOT p99 ms", 1),
    ("itl_p50_ms", "ITL p50 ms", 1),
    ("itl_p99_ms", "ITL p99 ms", 1),
    ("itl_pooled_p50_ms", "ITL pooled p50 ms", 1),
    ("itl_pooled_p99_ms", "ITL pooled p99 ms", 1),
    ("itl_resident_p50_ms", "ITL resident p50 ms", 1),
    ("itl_resident_p99_ms", "ITL resident p99 ms", 1),
    ("latency_p50_s", "latency p50 s", 2),
    ("latency_p99_s", "latency p99 s", 2),
    ("preemptions", "preemptions", 0),
    ("recomputed_tokens", "tokens recomputed", 0),
    ("prefill_tokens", "prompt tokens computed", 0),
    ("pie_pooled_peak", "pooled peak", 0),
    ("loaded_mib", "loaded MiB", 0),
    ("tokens_per_step", "tokens of a request's step", 2),
    ("loaded_kib_per_token", "loaded KiB per token", 1),
    ("to_stock", "tokens/s over stock's", 3),
    ("stored_mib", "stored MiB", 0),
    ("idle_cost_blocks", "ring costs, blocks", 2),
    ("stall_share", "stall, share", 4),
    ("slowdown_share", "slowdown of steps that load, estimated", 4),
    ("blocks_hidden", "pooled blocks that a step reads", 1),
    ("blocks_predicted", "the same, predicted", 1),
    ("hidden_to_predicted", "read / predicted", 3),
    ("equal_answers", "equal answers", 0),
)


def print_figures(title: str, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Print the medians, a column for each configuration; figures that no run has are left out."""
    rows = []
    for key, label, digits in FIGURES:
        cells = [
            f"{spread(column(rounds, key)).median:,.{digits}f}" if in_all(rounds, key) else "-"
            for rounds in figures.values()
        ]
        if any(cell != "-" for cell in cells):
            rows.append([label, *cells])
    table(f"{title}: medians", ["", *figures], rows)


def print_answers(
    questions: Sequence[Question], figures: Mapping[str, Sequence[Figures]]
) -> dict[str, Any]:
    """Print each ratio beside what is asked of it; returns them for the result file."""
    found = answers(questions, figures)
    rows, data = [], {}
    for question in questions:
        if question.name not in found:
            continue
        ratio = found[question.name]
        reached = question.reached(ratio.median)
        asked = f"{'at most ' if question.less else ''}{question.asked:.2f}"
        rows.append([question.name, ratio.text(), asked, "yes" if reached else "NO"])
        data[question.name] = {**ratio.as_dict(), "asked": question.asked, "reached": reached}
    if rows:
        table(
            "Paired by round: median [least .. greatest]",
            ["ratio", "measured", "asked", "reached"],
            rows,
        )
    return data


def plot(path: Path, title: str, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Draw throughput (bars, every run a dot) and inter-token latency of the configurations."""
    names = list(figures)
    places = range(len(names))
    with drawing(path, title, (8, 4), 1, 2) as (left, right):
        colors = ["tab:orange" if name.startswith("pie") else "tab:gray" for name in names]
        throughput = [column(figures[name], "tok_s") for name in names]
        left.bar(places, [spread(values).median for values in throughput], color=colors)
        for place, values in zip(places, throughput, strict=True):
            left.plot([place] * len(values), values, "k.", markersize=5)
        left.set_ylabel("tokens/s, median; dots are runs")
        for key, offset, shade, label in (
            ("itl_p50_ms", -0.2, 0.55, "p50"),
            ("itl_p99_ms", 0.2, 1.0, "p99"),
        ):
            medians = [spread(column(figures[name], key)).median for name in names]
            bars = [place + offset for place in places]
            right.bar(bars, medians, width=0.4, color=colors, alpha=shade)
            for x, height in zip(bars, medians, strict=True):
                right.annotate(label, (x, height), ha="center", va="bottom", fontsize="small")
        right.set_ylabel("time between tokens, ms")
        for axes in (left, right):
            axes.set_xticks(places, [name.replace("_", "\n") for name in names])


def publish(
    stem: Path,
    title: str,
    setup: Mapping[str, Any],
    questions: Sequence[Question],
    figures: Mapping[str, Sequence[Figures]],
    draw: Callable[[Path, str, Mapping[str, Sequence[Figures]]], None] = plot,
) -> None:
    """Print everything, and write `stem`.json and, by `draw`, `stem`.png.

    The file has the plain numbers of each run; the rest is in the whole of the result.
    """
    print_figures(title, figures)
    ratios = print_answers(questions, figures)
    keys = [key for key, _, _ in FIGURES]
    data = {
        "question": title,
        "machine": facts(),
        "setup": dict(setup),
        "ratios": ratios,
        "medians": {name: summarize(rounds, keys) for name, rounds in figures.items()},
        "runs": {name: [numbers_of(run) for run in rounds] for name, rounds in figures.items()},
    }
    write_result(stem, data, {"runs": {name: list(rounds) for name, rounds in figures.items()}})
    draw(stem.with_suffix(".png"), title, figures)
    say_written(stem)


def redraw(
    stem: Path, draw: Callable[[Path, str, Mapping[str, Sequence[Figures]]], None] = plot
) -> None:
    """Draw `stem`.png anew, from `stem`.json alone."""
    data = read_result(stem)
    draw(stem.with_suffix(".png"), data["question"], data["runs"])
    say_written(stem)

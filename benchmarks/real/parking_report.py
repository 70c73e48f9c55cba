"""Prints, plots and stores what the loads of `benchmarks.parking` showed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.display import console, say_written
from benchmarks.harness.drawing import drawing
from benchmarks.harness.machine import facts
from benchmarks.harness.report import FIGURES, print_answers, print_figures
from benchmarks.harness.result_file import numbers_of, read_result, write_result
from benchmarks.harness.rounds import Figures, Question, column, in_all, summarize
from benchmarks.harness.stats import spread

SHOWN = {
    "tok_s": "tokens/s",
    "latency_p99_s": "latency p99, s",
    "ttft_p50_ms": "TTFT p50, ms",
    "prefill_tokens": "prompt tokens computed",
    "recomputed_tokens": "tokens recomputed",
}


COLUMNS = 2
"""Axes beside each other: more could not be read on a page."""


@dataclass(frozen=True)
class Part:
    """One load: what was asked, what was found.

    Attributes:
        title: description of the load.
        questions: ratios asked of it.
        figures: figures of each configuration, round by round.
        none_again: configurations in which no token is to be computed again.
    """

    title: str
    questions: Sequence[Question]
    figures: Mapping[str, Sequence[Figures]]
    none_again: Sequence[str] = ()

    def recomputed(self) -> dict[str, Any]:
        """The maximum over the rounds of the tokens recomputed where none are to be."""
        found = {}
        for name in self.none_again:
            if name in self.figures:
                most = max(column(self.figures[name], "recomputed_tokens"))
                found[name] = {"max": most, "asked": 0, "reached": most == 0}
        return found

    def shown(self) -> list[str]:
        """Figures worth a drawing: what is asked about."""
        keys = [question.key for question in self.questions]
        return list(dict.fromkeys(keys + ["recomputed_tokens"] * bool(self.none_again)))


def print_part(part: Part) -> dict[str, Any]:
    """Print one load; returns what the result file says of it."""
    print_figures(part.title, part.figures)
    ratios = print_answers(part.questions, part.figures)
    recomputed = part.recomputed()
    for name, found in recomputed.items():
        verdict = "as asked" if found["reached"] else "NOT as asked: 0"
        console.print(f"  {name} recomputed {found['max']:.0f} tokens, {verdict}")
    keys = [key for key, _, _ in FIGURES]
    return {
        "load": part.title,
        "ratios": ratios,
        "recomputed_tokens": recomputed,
        "medians": {name: summarize(rounds, keys) for name, rounds in part.figures.items()},
        "runs": {name: [numbers_of(run) for run in runs] for name, runs in part.figures.items()},
    }


def draw_bars(axes: Any, part: Part, key: str) -> None:
    """One figure of all configurations, every run a dot, and what is asked as a line."""
    names = [name for name, rounds in part.figures.items() if in_all(rounds, key)]
    places = range(len(names))
    values = [column(part.figures[name], key) for name in names]
    colors = ["tab:orange" if name.startswith("pie") else "tab:gray" for name in names]
    medians = {name: spread(each).median for name, each in zip(names, values, strict=True)}
    axes.bar(places, list(medians.values()), color=colors)
    for place, each in zip(places, values, strict=True):
        axes.plot([place] * len(each), each, "k.", markersize=5)
    for question in part.questions:
        if question.key == key and question.below in medians:
            level = question.asked * medians[question.below]
            word = "at most" if question.less else "at least"
            axes.axhline(level, color="tab:red", linestyle="--", label=f"pie asked: {word} this")
            axes.legend(fontsize="small")
    axes.set_xticks(places, [name.replace("_", "\n") for name in names])


def plot(path: Path, title: str, parts: Mapping[str, Part]) -> None:
    """Draw, for each load, the figures that are asked about."""
    wanted = [(name, key) for name, part in parts.items() for key in part.shown()]
    rows = -(-len(wanted) // COLUMNS)
    with drawing(path, title, (8, 0.5 + 2.8 * rows), rows, COLUMNS, squeeze=False) as axes:
        places = list(itertools.chain(*axes))
        for place, (name, key) in zip(places, wanted, strict=False):
            draw_bars(place, parts[name], key)
            place.set_title(f"{name}: {SHOWN.get(key, key)}")
        for place in places[len(wanted) :]:
            place.set_axis_off()


def publish_parts(
    stem: Path, title: str, setup: Mapping[str, Any], parts: Mapping[str, Part]
) -> None:
    """Print everything, and write `stem`.json and `stem`.png."""
    data = {
        "question": title,
        "machine": facts(),
        "setup": dict(setup),
        "loads": {name: print_part(part) for name, part in parts.items()},
    }
    runs = {name: dict(part.figures) for name, part in parts.items()}
    write_result(stem, data, {"runs": runs})
    plot(stem.with_suffix(".png"), title, parts)
    say_written(stem)


def redraw_parts(stem: Path, questions: Mapping[str, Sequence[Question]]) -> None:
    """Draw `stem`.png anew, from `stem`.json alone; `questions` are those of each load."""
    data = read_result(stem)
    parts = {
        name: Part(load["load"], questions[name], load["runs"], tuple(load["recomputed_tokens"]))
        for name, load in data["loads"].items()
    }
    plot(stem.with_suffix(".png"), data["question"], parts)
    say_written(stem)

"""Interleaved rounds of runs: every configuration once a round, the order turned each round.

A shared machine drifts by several percent over minutes. Runs of one round are close in time,
so ratios are taken within a round, and the median of those ratios is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.stats import Spread, paired_ratio, spread

Figures = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A ratio that a benchmark answers, and the value asked of it.

    Attributes:
        above: configuration whose figure is divided.
        below: configuration whose figure divides it.
        asked: lower bound of a ratio that counts as reached; upper bound where less is better.
        key: name of the figure; throughput by default.
        less: whether less is better.
    """

    above: str
    below: str
    asked: float
    key: str = "tok_s"
    less: bool = False

    @property
    def name(self) -> str:
        """Name of the ratio in results."""
        ratio = f"{self.above} / {self.below}"
        return ratio if self.key == "tok_s" else f"{self.key}, {ratio}"

    def reached(self, ratio: float) -> bool:
        """Whether a ratio is as asked."""
        return ratio <= self.asked if self.less else ratio >= self.asked


def run_rounds(
    runs: Mapping[str, Callable[[int], Figures]], repeats: int
) -> dict[str, list[Figures]]:
    """Call every run once a round; returns the figures of each, round by round."""
    names = list(runs)
    figures: dict[str, list[Figures]] = {name: [] for name in names}
    for index in range(repeats):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            figures[name].append(runs[name](index))
    return figures


def column(figures: Sequence[Figures], key: str) -> list[float]:
    """One figure of all rounds."""
    return [float(round_[key]) for round_ in figures]


def in_all(figures: Sequence[Figures], key: str) -> bool:
    """Whether every round has the figure."""
    return all(key in round_ for round_ in figures)


def answers(
    questions: Sequence[Question], figures: Mapping[str, Sequence[Figures]]
) -> dict[str, Spread]:
    """The paired ratio of each question whose two sides were run."""
    return {
        question.name: paired_ratio(
            column(figures[question.above], question.key),
            column(figures[question.below], question.key),
        )
        for question in questions
        if question.above in figures and question.below in figures
    }


def summarize(figures: Sequence[Figures], keys: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median and extremes of some figures of one configuration."""
    return {key: spread(column(figures, key)).as_dict() for key in keys if in_all(figures, key)}

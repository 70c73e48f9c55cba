"""Medians, percentiles and paired ratios of repeated runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of `values` lie, with linear interpolation."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


CURVE_PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.9, 100)
"""The points of a curve: close together where it is long."""


def curve(values: Sequence[float]) -> list[float]:
    """A distribution in few numbers: the percentiles of CURVE_PERCENTS."""
    ordered = sorted(values)
    return [percentile(ordered, percent) for percent in CURVE_PERCENTS]


def draw_curve(axes: Any, points: Sequence[float], label: str, **style: Any) -> None:
    """Draw a curve as the share of values above x, so that the tail is seen."""
    above = [1 - percent / 100 for percent in CURVE_PERCENTS]
    axes.plot(points[:-1], above[:-1], label=label, **style)
    axes.set_yscale("log")
    axes.set_ylabel("share above")


@dataclass(frozen=True)
class Spread:
    """Median and extremes of one figure over repeated runs."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For a JSON file."""
        return asdict(self)

    def text(self, digits: int = 2) -> str:
        """Readable, with the extremes in brackets."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f} .. {self.high:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread:
    """Summarize repeated measurements of one figure."""
    return Spread(median(values), min(values), max(values))


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Ratios of runs of the same round; rounds are interleaved, so slow drift cancels."""
    return spread([a / b for a, b in zip(above, below, strict=True)])

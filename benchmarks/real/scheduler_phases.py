"""Measures the phases of `benchmarks.scheduler_cost`: both schedulers, step by step in turns."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.real.scheduler_side import (
    BLOCK_SIZE,
    REQUESTS,
    PieSide,
    Side,
    difference_of,
    tiers,
    two_sides,
)

PHASES = ("idle", "steady", "demoting", "rotating")


class Cost(NamedTuple):
    """One phase; medians over its steps, microseconds."""

    stock_us: float
    pie_us: float
    own_us: float
    difference_us: float
    difference_error_us: float
    demotions: float
    pooled: float


class Sample(NamedTuple):
    """One step of both schedulers, nanoseconds."""

    stock: int
    pie: int
    own: int
    demotions: int
    pooled: int


def measure(stock: Side, pie: PieSide, phase: str, steps: int) -> list[Sample]:
    """Steps of a phase; the phases are measured in the order of PHASES, one after the other."""
    if phase == "steady":
        pie.fill()
    samples = []
    for turn in range(steps):
        before = pie.residency.demotions
        if phase == "rotating":
            stock.leave_out(turn)
            pie.leave_out(turn)
        if phase in ("steady", "rotating"):
            pie.release(REQUESTS // BLOCK_SIZE)
        times = {}
        for side in (stock, pie) if turn % 2 else (pie, stock):
            times[side] = side.step()
        own = times[pie] - pie.scheduler.inner
        own += pie.scheduler.allocating - stock.scheduler.allocating
        own -= times[stock] - stock.scheduler.inner  # What taking these times costs.
        done = pie.residency.demotions - before
        samples.append(Sample(times[stock], times[pie], own, done, pie.residency.pooled_in_use))
    return samples


def cost(samples: Sequence[Sample]) -> Cost:
    """Medians."""
    difference, error = difference_of([(s.stock, s.pie) for s in samples])
    return Cost(
        stock_us=median(s.stock for s in samples) / 1e3,
        pie_us=median(s.pie for s in samples) / 1e3,
        own_us=median(s.own for s in samples) / 1e3,
        difference_us=difference,
        difference_error_us=error,
        demotions=sum(s.demotions for s in samples) / len(samples),
        pooled=sum(s.pooled for s in samples) / len(samples),
    )


def one_round(
    blocks: int, steps: int, phases: Sequence[str] = PHASES, asynchronous: bool = True
) -> dict[str, list[Sample]]:
    """All phases once, over ``blocks`` blocks, resident and pooled."""
    stock, pie = two_sides(tiers(blocks), steps, len(PHASES), asynchronous)
    # As vLLM's engine core does after its start: objects made so far are not scanned again.
    gc.collect()
    gc.freeze()
    try:
        return {phase: measure(stock, pie, phase, steps) for phase in phases}
    finally:
        gc.unfreeze()


def costs(
    blocks: int, steps: int, rounds: int = 1, phases: Sequence[str] = PHASES, **options: Any
) -> dict[str, Cost]:
    """The phases' costs over several rounds."""
    results = [one_round(blocks, steps, phases, **options) for _ in range(rounds)]
    return {phase: cost([s for r in results for s in r[phase]]) for phase in phases}

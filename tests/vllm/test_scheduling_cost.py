"""What pie adds to a scheduler step stays small and does not grow with the number of blocks.

The exact figures are those of ``benchmarks.scheduler_cost``; the bounds here are wide, for a
machine that is slow, or busy with something else.
"""

from __future__ import annotations

import pytest

from benchmarks.real.parked_context import ContextCost, ParkedContext
from benchmarks.real.scheduler_phases import (
    POOLED_EACH,
    POOLED_REQUESTS,
    PhaseCost,
    phase_costs,
)

pytestmark = [pytest.mark.vllm, pytest.mark.alone]

PHASES = ("idle", "steady", "demoting")
MOST_OWN_SHARE = 0.1
"""Of stock's whole step in the same run, so that a slow machine does not count."""

MOST_DEMOTION_US = 400.0
MOST_PARKED_BLOCK_US = 150.0
NOISE_US = 100.0
CONTEXT = 256


@pytest.fixture(scope="module")
def measured() -> dict[int, dict[str, PhaseCost]]:
    """Costs over ten and a hundred thousand blocks, the same load.

    The cheaper of two measurements each: what else the machine does only adds.
    """

    def cheaper(blocks: int) -> dict[str, PhaseCost]:
        runs = [phase_costs(blocks, steps=24, phases=PHASES) for _ in range(2)]
        return {p: min((run[p] for run in runs), key=lambda cost: cost.own) for p in PHASES}

    return {blocks: cheaper(blocks) for blocks in (10_000, 100_000)}


def test_the_load_is_the_one_that_is_meant(measured: dict[int, dict[str, PhaseCost]]) -> None:
    """64 requests hold 32 pooled blocks each, and only one phase demotes."""
    for costs in measured.values():
        assert costs["idle"].pooled == 0
        assert costs["steady"].pooled == pytest.approx(POOLED_REQUESTS * POOLED_EACH, rel=0.02)
        assert costs["steady"].demotions == 0
        assert costs["demoting"].demotions == pytest.approx(16, abs=2)


@pytest.mark.parametrize("phase", PHASES)
def test_the_cost_does_not_grow_with_the_number_of_blocks(
    measured: dict[int, dict[str, PhaseCost]], phase: str
) -> None:
    """Ten times the blocks cost less than half as much again."""
    few, many = (costs[phase].own for costs in measured.values())
    assert many < 1.5 * few + NOISE_US


def test_a_step_stays_cheap(measured: dict[int, dict[str, PhaseCost]]) -> None:
    """A steady step and a demotion stay within wide bounds."""
    for costs in measured.values():
        assert costs["steady"].own < MOST_OWN_SHARE * costs["steady"].stock
        demotions = costs["demoting"].own - costs["steady"].own
        assert demotions < MOST_DEMOTION_US * costs["demoting"].demotions + NOISE_US


@pytest.fixture(scope="module")
def over_a_full_pool() -> dict[int, ContextCost]:
    """A context that comes back, out of two and twenty thousand parked blocks: the cheapest."""
    found: dict[int, ContextCost] = {}
    for _ in range(3):
        for rows in (2_000, 20_000):
            cost = ParkedContext(CONTEXT, rows=rows).comes_back()
            found[rows] = min(found.get(rows, cost), cost, key=lambda one: one.admission)
    return found


def test_an_admission_does_not_cost_more_the_more_is_parked(
    over_a_full_pool: dict[int, ContextCost],
) -> None:
    """Ten times the parked blocks, less than half as much again."""
    few, many = over_a_full_pool.values()
    assert many.admission < 1.5 * few.admission + 2.0
    assert many.finish < 1.5 * few.finish + 2.0


def test_an_admission_over_a_full_pool_stays_cheap(
    over_a_full_pool: dict[int, ContextCost],
) -> None:
    """For each block that is found, restored, evicted and parked, within a wide bound."""
    for cost in over_a_full_pool.values():
        assert 1e3 * cost.admission < MOST_PARKED_BLOCK_US * CONTEXT

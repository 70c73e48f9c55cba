"""What pie adds to a scheduler step stays small and does not grow with the number of blocks.

The exact figures are those of ``benchmarks.scheduler_cost``; the bounds here are wide, for a
machine that is busy with something else.
"""

from __future__ import annotations

import pytest

from benchmarks.real.parked_side import CHAT_BLOCKS, ParkedCost, parked_costs
from benchmarks.real.scheduler_phases import Cost
from benchmarks.real.scheduler_phases import costs as costs_of
from benchmarks.real.scheduler_side import POOLED_EACH, POOLED_REQUESTS

pytestmark = [pytest.mark.vllm, pytest.mark.alone]

PHASES = ("idle", "steady", "demoting")
MOST_OWN_US = 500.0
MOST_DEMOTION_US = 400.0
MOST_PARKED_BLOCK_US = 150.0
NOISE_US = 100.0


@pytest.fixture(scope="module")
def measured() -> dict[int, dict[str, Cost]]:
    """Costs over ten and a hundred thousand blocks, the same load.

    The cheaper of two measurements each: what else the machine does only adds.
    """

    def cheaper(blocks: int) -> dict[str, Cost]:
        runs = [costs_of(blocks, steps=24, phases=PHASES) for _ in range(2)]
        return {p: min((run[p] for run in runs), key=lambda cost: cost.own_us) for p in PHASES}

    return {blocks: cheaper(blocks) for blocks in (10_000, 100_000)}


def test_the_load_is_the_one_that_is_meant(measured: dict[int, dict[str, Cost]]) -> None:
    """64 requests hold 32 pooled blocks each, and only one phase demotes."""
    for costs in measured.values():
        assert costs["idle"].pooled == 0
        assert costs["steady"].pooled == pytest.approx(POOLED_REQUESTS * POOLED_EACH, rel=0.02)
        assert costs["steady"].demotions == 0
        assert costs["demoting"].demotions == pytest.approx(16, abs=2)


@pytest.mark.parametrize("phase", PHASES)
def test_the_cost_does_not_grow_with_the_number_of_blocks(
    measured: dict[int, dict[str, Cost]], phase: str
) -> None:
    """Ten times the blocks cost less than half as much again."""
    few, many = (costs[phase].own_us for costs in measured.values())
    assert many < 1.5 * few + NOISE_US


def test_a_step_stays_cheap(measured: dict[int, dict[str, Cost]]) -> None:
    """A steady step and a demotion stay within wide bounds (target: 100 us a steady step)."""
    for costs in measured.values():
        assert costs["steady"].own_us < MOST_OWN_US
        demotions = costs["demoting"].own_us - costs["steady"].own_us
        assert demotions < MOST_DEMOTION_US * costs["demoting"].demotions + NOISE_US


@pytest.fixture(scope="module")
def over_a_full_pool() -> dict[int, ParkedCost]:
    """Chats that come back, over ten and a hundred thousand parked blocks."""
    return {parked: parked_costs(parked, steps=8) for parked in (10_000, 100_000)}


def test_a_full_pool_is_full_and_its_blocks_are_hit(
    over_a_full_pool: dict[int, ParkedCost],
) -> None:
    """Each admission has all blocks of its chat restored, and parks as many others."""
    for parked, cost in over_a_full_pool.items():
        assert cost.parked == parked
        assert cost.restored_each == CHAT_BLOCKS
        assert cost.stored_each >= CHAT_BLOCKS - 1


def test_an_admission_does_not_cost_more_the_more_is_parked(
    over_a_full_pool: dict[int, ParkedCost],
) -> None:
    """Neither the look-up, nor the admission, nor the step, held against stock's of that time."""
    few, many = over_a_full_pool.values()
    for pie, stock in (
        ("pie_lookup_us", "stock_admission_us"),
        ("pie_admission_us", "stock_admission_us"),
        ("pie_us", "stock_us"),
    ):
        at_few = getattr(few, pie) / getattr(few, stock)
        assert getattr(many, pie) / getattr(many, stock) < 1.5 * at_few, pie


def test_an_admission_over_a_full_pool_stays_cheap(
    over_a_full_pool: dict[int, ParkedCost],
) -> None:
    """For each block that is found, restored, evicted and parked, within a wide bound."""
    for cost in over_a_full_pool.values():
        more = cost.pie_admission_us - cost.stock_admission_us
        assert more < MOST_PARKED_BLOCK_US * CHAT_BLOCKS

"""After a shift of load or link the decider settles within 50 steps, in simulation."""

from __future__ import annotations

import pytest

from benchmarks.simulated.shifts import (
    GEOMETRY,
    NAMES,
    SHIFT,
    STALL,
    first_after,
    mean_limit,
    settling,
    shift,
)
from pie_vllm.policy.control.decider import Decider
from pie_vllm.policy.control.detector import Observation
from pie_vllm.simulation.traces import Static


class HardOfHearing(Decider):
    """A decider that learns from one step in twenty."""

    def __init__(self) -> None:
        super().__init__(GEOMETRY.row_bytes, GEOMETRY.pooled_blocks)
        self._step = 0

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        self._step += 1
        if self._step % 20 == 0:
            super().observe(seen, within_budget=within_budget)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NAMES)
def test_it_settles_within_50_steps(name: str, seed: int) -> None:
    """Of any 50 steps that begin 50 or more after the shift, up to the 300th after it:

    the mean limit is within a fifth of the mean of the 100th to 300th step, and the stall, as a
    share of the rest of the time, within 1.1 times the target.
    """
    found = settling(shift(name, seed).play())
    assert found.reached, found


def test_the_link_shift_moves_the_limit() -> None:
    """Half the link, half the limit: there is something to settle to."""
    outcome = shift("link halves", 0).play()
    first = first_after(outcome)
    assert outcome.times[first].began >= SHIFT > outcome.times[first - 1].began
    before = mean_limit(outcome, range(first - 100, first))
    assert settling(outcome).limit == pytest.approx(before / 2, rel=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_limit_does_not_settle(name: str) -> None:
    """Negative control: the whole window, whatever it costs, stalls for ever."""
    found = settling(shift(name, 0).play(Static(GEOMETRY.pooled_blocks)))
    assert found.stall > 2 * STALL


def test_a_decider_that_learns_slowly_is_seen() -> None:
    """Negative control: after the link halves its limit is still on its way after 50 steps."""
    found = settling(shift("link halves", 0).play(HardOfHearing()))
    assert not found.reached

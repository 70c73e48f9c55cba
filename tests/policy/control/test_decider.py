"""Detector and Decider against links and steps of known speed."""

from __future__ import annotations

import random

import pytest

from pie_vllm.plan import Prior
from pie_vllm.policy.control.decider import (
    FIRST_BLOCKS,
    HANDLED_BLOCK_SECONDS,
    HANDLED_SECONDS_MAX,
    LONGEST_TURN,
    Decider,
    Decision,
    handled_blocks,
)
from pie_vllm.policy.control.detector import Detector, Observation
from pie_vllm.policy.control.step_time_model import FREE, LoadCost

ROW = 1_000_000
WINDOW = 500


class Machine:
    """Steps whose loads stall by what the compute does not hide.

    Attributes:
        link: bytes per second.
        step: seconds of a step that decodes.
        exposed: share of a load that no compute can hide.
        cost: what loads take from the compute beside them.
    """

    def __init__(
        self, link: float, step: float = 0.1, exposed: float = 0.0, cost: LoadCost = FREE
    ) -> None:
        self.link, self.step, self.exposed, self.cost = link, step, exposed, cost
        self.rng = random.Random(1)

    def run(self, blocks: int, prompt_tokens: int = 0) -> Observation:
        compute = (self.step + 1e-4 * prompt_tokens) * self.rng.uniform(0.97, 1.03)
        compute += self.cost.seconds(blocks * ROW)
        load = blocks * ROW / self.link
        stall = max(load - compute, load * self.exposed)
        return Observation(32 + prompt_tokens, 32, compute + stall, stall, blocks * ROW, load)


def settle(
    decider: Decider, machine: Machine, wanted: int = WINDOW, steps: int = 50
) -> list[Observation]:
    """Load as much as is decided, up to what is wanted, and return the steps."""
    seen = []
    for _ in range(steps):
        one = machine.run(min(wanted, decider.decide().load_blocks_max))
        decider.observe(one)
        seen.append(one)
    return seen


def test_a_few_blocks_may_be_pooled_before_the_link_is_known() -> None:
    """The first loads are how its speed is learnt, and must not be long on a slow one."""
    decider = Decider(ROW, WINDOW)
    first = Decision(
        FIRST_BLOCKS, FIRST_BLOCKS, 0, park_blocks_max=FIRST_BLOCKS, restore_blocks_max=FIRST_BLOCKS
    )
    assert decider.decide() == first
    decider.observe(Observation(32, 32, 0.1))
    assert decider.decide() == first


def test_what_was_measured_at_start_is_the_first_budget() -> None:
    """And steps soon outweigh it."""
    decider = Decider(ROW, WINDOW, prior=Prior(1e9))
    assert decider.decide().load_blocks_max == FIRST_BLOCKS
    decider.observe(Machine(1e9).run(0))
    assert 80 <= decider.decide().load_blocks_max <= 100
    settle(decider, Machine(2e8), steps=20)
    assert decider.decide().load_blocks_max <= 20


def test_the_step_that_was_timed_at_start_is_the_first_budget_too() -> None:
    """Without waiting for a step; the first one that only decodes replaces it."""
    decider = Decider(ROW, WINDOW, prior=Prior(1e9, step_seconds=0.05))
    assert decider.decide().load_blocks_max == pytest.approx(0.9 * 1e9 * 0.05 / ROW, abs=1)
    decider.observe(Observation(32, 32, 0.1))
    assert decider.decide().load_blocks_max == pytest.approx(0.9 * 1e9 * 0.1 / ROW, abs=1)


def test_what_was_timed_at_start_tells_larger_steps_from_smaller_ones() -> None:
    """Before it has seen any: with twice the requests, or with a prompt chunk."""
    prior = Prior(1e9, step_seconds=0.1, request_seconds=0.002, prompt_seconds=1e-4)
    decider = Decider(ROW, WINDOW, prior=prior)
    decider.observe(Observation(32, 32, 0.1))
    assert decider.decide().load_blocks_max == pytest.approx(90, abs=1)
    assert decider.decide(1000).load_blocks_max == pytest.approx(180, abs=2)
    decider.detector.observe(Observation(64, 64, 0.0))
    decider.observe(Observation(64 + 1000, 64, 0.264))
    assert decider.decide().load_blocks_max == pytest.approx(0.9 * 164, abs=2)


def test_no_more_of_the_link_is_counted_on_than_was_said() -> None:
    """However fast it is; a slower one is noticed."""
    for link, hidden in ((5e9, 100), (5e8, 50)):
        decider = Decider(ROW, WINDOW, prior=Prior(1e9, most_bandwidth=1e9))
        settle(decider, Machine(link))
        assert 0.8 * hidden <= decider.decide().load_blocks_max <= hidden


def test_without_a_target_nothing_is_limited() -> None:
    """`off`: also after loads that took long."""
    decider, machine = Decider(ROW, WINDOW, None), Machine(1e7)
    settle(decider, machine)
    assert decider.decide() == Decision(WINDOW, WINDOW, 0, store_ahead_max=WINDOW)


def test_less_than_a_block_a_step_is_a_block_every_few_steps() -> None:
    """On a link that slow pooled blocks still come back."""
    decider, machine = Decider(ROW, WINDOW), Machine(3e6)
    settle(decider, machine, wanted=1)
    budgets = [decider.decide().load_blocks_max for _ in range(100)]
    assert set(budgets) == {0, 1}
    assert 10 <= sum(budgets) <= 30
    assert decider.decide().pooled_demotion_max == int(LONGEST_TURN * sum(budgets) / 100) > 0


@pytest.mark.parametrize("link", [1e7, 1e8, 1e9, 1e10])
def test_the_budget_is_what_the_link_brings_in_a_step(link: float) -> None:
    """Within 50 steps it settles below what a step hides, and not far below."""
    decider, machine = Decider(ROW, WINDOW), Machine(link)
    settle(decider, machine)
    hidden = link * machine.step / ROW
    decision = decider.decide()
    assert decision.load_blocks_max <= min(WINDOW, hidden)
    assert decision.load_blocks_max >= min(WINDOW, int(0.8 * hidden))
    assert decision.load_blocks_max - 1 <= decision.pooled_admission_max <= decision.load_blocks_max
    recent = settle(decider, machine, steps=20)
    assert sum(one.stall_seconds for one in recent) <= 0.01 * sum(one.seconds for one in recent)


@pytest.mark.parametrize(("before", "after"), [(1e9, 2e8), (2e8, 1e9)])
def test_it_settles_again_after_the_link_changes(before: float, after: float) -> None:
    """Within 50 steps."""
    decider, machine = Decider(ROW, WINDOW), Machine(before)
    settle(decider, machine)
    machine.link = after
    settle(decider, machine)
    hidden = after * machine.step / ROW
    assert 0.6 * hidden <= decider.decide().load_blocks_max <= hidden


def test_stall_within_the_budget_lowers_it_and_it_comes_back() -> None:
    """The feedback sees what the model does not: here, loads that are a third exposed."""
    decider, machine = Decider(ROW, WINDOW), Machine(1e9, exposed=0.3)
    settle(decider, machine, steps=300)
    hidden = 1e9 * machine.step / ROW
    assert decider.decide().load_blocks_max < 0.3 * hidden
    machine.exposed = 0.0
    settle(decider, machine, steps=200)
    assert decider.decide().load_blocks_max > 0.8 * hidden


COSTS = {
    "fixed": LoadCost(0.005, 0.0),
    "by the byte": LoadCost(0.0, 0.06 / 1e9),
    "both": LoadCost(0.004, 0.03 / 1e9),
}
"""Of a machine that loads 90 MB in a step of 100 ms: 3 to 7 % of the step."""


def slowdown(machine: Machine, seen: list[Observation]) -> float:
    """Time over that of steps that load nothing, less 1."""
    lost = sum(o.stall_seconds + machine.cost.seconds(o.bytes_loaded) for o in seen)
    return lost / (sum(o.seconds for o in seen) - lost)


@pytest.mark.parametrize("cost", COSTS)
def test_what_loads_take_from_the_compute_counts(cost: str) -> None:
    """Few blocks are loaded, or in few steps, and so the mean slowdown is within the target."""
    machine = Machine(1e9, cost=COSTS[cost])
    decider = Decider(ROW, WINDOW)
    settle(decider, machine, wanted=0)
    settle(decider, machine, steps=400)
    seen = settle(decider, machine, steps=400)
    assert 0.003 <= slowdown(machine, seen) <= 0.012
    assert 0 < sum(one.bytes_loaded for one in seen) < 0.5 * 90 * ROW * len(seen)
    if COSTS[cost].fixed:
        assert sum(1 for one in seen if one.bytes_loaded) < 0.5 * len(seen)
        assert decider.decide().pooled_admission_max < 0.2 * 90


def test_prompts_make_room_within_the_target_only() -> None:
    """Where the compute pays for each byte, a prompt chunk allows as much more as it is longer."""
    machine = Machine(1e9, cost=COSTS["by the byte"])
    decider = Decider(ROW, WINDOW)
    rng = random.Random(3)
    for i in range(1000):
        wanted = rng.randint(0, 90) if i < 500 else WINDOW
        budget = min(wanted, decider.decide().load_blocks_max)
        decider.observe(machine.run(budget, prompt_tokens=1000 * (i % 10 == 0)))
    decode, prompt = decider.decide(), decider.decide(1000)
    assert 0 < decode.pooled_admission_max < 25
    assert (
        1.5 * decode.pooled_admission_max
        <= prompt.load_blocks_max
        <= 2.5 * decode.pooled_admission_max + 1
    )


def test_stall_and_contention_share_the_target() -> None:
    """Loads that are a little exposed too: both together are within it."""
    machine = Machine(1e9, exposed=0.06, cost=LoadCost(0.0, 0.02 / 1e9))
    decider = Decider(ROW, WINDOW)
    rng = random.Random(3)
    for _ in range(500):
        decider.observe(machine.run(min(rng.randint(0, 90), decider.decide().load_blocks_max)))
    settle(decider, machine, steps=200)
    assert slowdown(machine, settle(decider, machine, steps=400)) <= 0.012


@pytest.mark.parametrize("cost", COSTS)
def test_it_does_not_count_where_it_must_not(cost: str) -> None:
    """The copies of a CPU's own cores; negative control of the test above."""
    machine = Machine(1e9, cost=COSTS[cost])
    decider = Decider(ROW, WINDOW, prior=Prior(limits_contention=False))
    settle(decider, machine, wanted=0)
    settle(decider, machine, steps=400)
    seen = settle(decider, machine, steps=400)
    assert slowdown(machine, seen) > 0.025
    assert decider.detector.slowed_seconds > 0


def test_prompts_make_room_for_more() -> None:
    """A step with a prompt chunk takes longer and hides more; admission does not count on it."""
    decider, machine = Decider(ROW, WINDOW), Machine(1e9)
    for i in range(60):
        decider.observe(machine.run(20, prompt_tokens=1000 * (i % 3 == 0)))
    decode, prompt = decider.decide(), decider.decide(1000)
    assert prompt.load_blocks_max > 1.7 * decode.load_blocks_max
    assert prompt.pooled_admission_max == decode.pooled_admission_max


def test_the_spare_grows_with_time_and_is_spent_by_stall() -> None:
    """A hundredth of the time may be stall, for requests larger than the budget."""
    decider, machine = Decider(ROW, WINDOW), Machine(1e9)
    settle(decider, machine, wanted=1, steps=200)
    spare = decider.decide().spare_load_blocks_max
    assert spare == pytest.approx(0.01 * 200 * 0.1 * 1000, rel=0.3)
    large = machine.run(decider.decide().load_blocks_max + spare)
    decider.observe(large, within_budget=False)
    assert decider.decide().spare_load_blocks_max < 0.3 * spare
    assert Detector().stall_share == decider.detector.stall_share == 0.0


def test_a_step_without_a_model_teaches_nothing_of_time() -> None:
    """Steps of no tokens move KV only."""
    detector = Detector()
    detector.observe(Observation(0, 0, 0.5, 0.0, ROW, 0.001))
    assert detector.step_seconds is None
    assert detector.bandwidth == pytest.approx(ROW / 0.001)


def test_as_much_is_stored_for_parking_as_the_link_takes_in_a_step() -> None:
    """More where prompts are computed; the window, and the budget of loads, do not limit it."""
    prior = Prior(bandwidth=2000 * ROW, step_seconds=0.1, prompt_seconds=1e-3)
    decider = Decider(ROW, 50, prior=prior)
    assert decider.decide().park_blocks_max == pytest.approx(0.9 * 200, abs=1)
    assert decider.decide(100).park_blocks_max == pytest.approx(0.9 * 400, abs=1)
    assert decider.decide(100).load_blocks_max == 50
    assert Decider(ROW, 50, None, prior).decide().park_blocks_max is None
    endless = Decider(
        ROW, 50, prior=prior._replace(bandwidth=float("inf"), limits_contention=False)
    )
    assert endless.decide().park_blocks_max is None
    assert endless.decide(100).park_blocks_max is None


def test_a_part_of_it_may_be_stored_ahead_of_eviction() -> None:
    """Nothing while loads stall steps more than the target; the whole window without a target."""
    prior = Prior(bandwidth=2000 * ROW, step_seconds=0.1, limits_contention=False)
    decider = Decider(ROW, 50, prior=prior)
    assert decider.decide().store_ahead_max == pytest.approx(20, abs=1)
    decider.observe(Observation(32, 32, 0.1))
    for _ in range(3):
        decider.observe(Observation(32, 32, 0.15, 0.05, 50 * ROW, 0.025))
    assert decider.decide().store_ahead_max == 0
    assert Decider(ROW, 50, None, prior).decide().store_ahead_max == 50
    assert Decider(ROW, 50).decide().store_ahead_max == 0


def test_as_much_is_copied_back_at_once_as_the_link_hides() -> None:
    """Whatever the window: these blocks are resident then."""
    prior = Prior(bandwidth=2000 * ROW, step_seconds=0.1, limits_contention=False)
    assert Decider(ROW, 50, prior=prior).decide().restore_blocks_max == pytest.approx(180, abs=1)
    assert Decider(ROW, 50, None, prior).decide().restore_blocks_max is None


@pytest.mark.parametrize(("tokens", "restores"), [(16, False), (128, True)])
def test_parked_blocks_are_restored_where_that_is_quicker(tokens: int, restores: bool) -> None:
    """One takes 0.1 s on this link, a token 1 ms. What is not restored is not stored either."""
    prior = Prior(bandwidth=10 * ROW, step_seconds=0.1, prompt_seconds=1e-3)
    decision = Decider(ROW, WINDOW, prior=prior, block_tokens=tokens).decide()
    assert decision.restore_enabled is restores
    assert (decision.park_blocks_max != 0) is restores


def test_what_is_restored_is_no_slowdown_of_pooling() -> None:
    """It stalls a step instead of computing in it: neither budget nor savings suffer."""
    prior = Prior(bandwidth=1000 * ROW, step_seconds=0.1, limits_contention=False)
    decider, other = Decider(ROW, WINDOW, prior=prior), Decider(ROW, WINDOW, prior=prior)
    for _ in range(30):
        seen = Observation(33, 32, 0.5, 0.4, 400 * ROW, 0.4, restored=True)
        decider.observe(seen)
        other.observe(seen._replace(restored=False))
    assert decider.decide().load_blocks_max >= 90 > other.decide().load_blocks_max


def test_what_a_step_handles_is_bounded_for_long_steps_too() -> None:
    """A step of a long prompt does not take the scheduler for longer than two milliseconds."""
    short, long, longest = (handled_blocks(seconds) for seconds in (0.01, 0.03, 1.0))
    assert short < long < longest
    assert longest * HANDLED_BLOCK_SECONDS <= HANDLED_SECONDS_MAX

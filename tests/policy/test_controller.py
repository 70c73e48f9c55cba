"""What the controller tells the parts of the policy around a step."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS, PoolOrder, PoolState, StepOrders, StepPlan, StepReport, Totals
from pie_vllm.policy.control.detector import Observation
from pie_vllm.policy.control.stall_samples import MOST_WAITING
from pie_vllm.policy.controller import Controller
from pie_vllm.simulation.simulator import Simulation
from pie_vllm.simulation.traces import Job, Profile, Static

GEOMETRY = Geometry(8, 65536, 20, 8, 2, 8, 8, 4096)
PLAN = StepPlan(1, NO_RUNS, NO_RUNS, NO_RUNS, (), forward=True)
MACHINE = Profile(1e9, 0.01, 0.0, 1e-4, 0.0)


class Noting(Static):
    """Notes what it is told."""

    def __init__(self, limit: int = 1, **other: int) -> None:
        super().__init__(limit, **other)
        self.seen: list[tuple[Observation, bool]] = []

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        self.seen.append((seen, within_budget))


@pytest.fixture
def noting() -> Noting:
    """A decider that notes."""
    return Noting()


@pytest.fixture
def controller(noting: Noting) -> Controller:
    """Of a scheduler without requests."""
    return Simulation(GEOMETRY, MACHINE, [], noting).controller


def orders(step: int, plan: StepPlan | None = PLAN, **other: Any) -> StepOrders:
    """Of a step of that number, whose requests hold five blocks."""
    return StepOrders(plan and plan._replace(step=step), PoolOrder(1), blocks=5, **other)


def report(totals: Totals, failure: str = "") -> StepReport:
    """Of a step that took 10 ms."""
    return StepReport(totals, PoolState(1), 0.01, failure)


def test_a_step_in_a_graph_is_observed_at_once(controller: Controller, noting: Noting) -> None:
    """Without a stall, and outside of the feedback on it; other steps wait, but not for ever."""
    totals = Totals(steps=1, bytes_loaded=8192, graph_steps=1)
    controller.observe(orders(1), report(totals), 3, 3)
    assert noting.seen == [(Observation(3, 3, 0.01, bytes_loaded=8192, blocks=5), False)]
    for number in range(MOST_WAITING + 1):
        totals = totals._replace(bytes_loaded=totals.bytes_loaded + 4096)
        controller.observe(orders(2 + number), report(totals), 3, 3)
        assert len(noting.seen) == 1 + (number == MOST_WAITING)
    assert noting.seen[1] == (Observation(3, 3, 0.01, bytes_loaded=4096, blocks=5), False)


def test_a_stall_that_comes_later_is_put_in(controller: Controller, noting: Noting) -> None:
    """The step that was timed, and the one before it by its bytes."""
    controller.observe(orders(1), report(Totals(bytes_loaded=100)), 2, 2)
    assert not noting.seen
    timed = Totals(bytes_loaded=300, stall_step=2, step_stall=0.002)
    controller.observe(orders(2, within_budget=False), report(timed), 2, 2)
    stalls = [(seen.stall_seconds, within) for seen, within in noting.seen]
    assert stalls == [(0.001, True), (0.002, False)]


def test_a_step_without_a_plan_is_observed_at_once(controller: Controller, noting: Noting) -> None:
    """It stalled for nothing."""
    controller.observe(orders(1, None, restored=True), report(Totals()), 9, 2)
    assert noting.seen == [(Observation(9, 2, 0.01, blocks=5, restored=True), True)]


def test_nothing_is_learnt_from_a_step_that_failed(controller: Controller, noting: Noting) -> None:
    """Its bytes are not counted with those of the next step either."""
    controller.observe(orders(1, None), report(Totals(bytes_loaded=100), "torn"), 2, 2)
    assert not noting.seen
    controller.observe(orders(2, None), report(Totals(bytes_loaded=150)), 2, 2)
    assert [seen.bytes_loaded for seen, _ in noting.seen] == [50]


def test_what_left_out_requests_hold_is_not_counted() -> None:
    """A step's blocks are those that its own attention reads, as many as the machine computes."""
    read = []

    class Machine(Profile):
        def step_seconds(self, requests: int, prompt_tokens: int, blocks: int) -> float:
            read.append(blocks)
            return super().step_seconds(requests, prompt_tokens, blocks)

    decider = Noting(8, budget=4, spare=8)
    jobs = [Job(0.0, 16, 96)] * 6
    simulation = Simulation(GEOMETRY, Machine(1e9, 0.01, 0.0, 1e-4, 0.0), jobs, decider)
    simulation.run(3000)
    assert simulation.controller.turns.left_out
    assert sorted(seen.blocks for seen, _ in decider.seen) == sorted(read)

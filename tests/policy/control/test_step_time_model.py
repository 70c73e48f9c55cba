"""The model of a step's time, against steps whose terms are known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import pytest

from pie_vllm.policy.control.step_time_model import FREE, OFTEN, LoadCost, StepModel

BANDWIDTH = 1e10
FULL = 200_000_000
"""Bytes; what the link brings in 20 ms."""


@dataclass
class Machine:
    """Steps of some 20 ms, whose batch and loads wander."""

    fixed: float = 0.0
    per_byte: float = 0.0
    noise: float = 0.02
    slower: float = 1.0
    seed: int = 1

    def true_seconds(self, requests: int, blocks: int) -> float:
        return (0.01 + 1e-4 * requests + 1e-5 * blocks) * self.slower

    def steps(self, count: int, loads: bool = True) -> Iterator[tuple[int, int, int, float]]:
        rng = random.Random(self.seed)
        requests, loaded = 30, 0
        for i in range(count):
            requests = min(max(requests + rng.choice((-1, 0, 0, 1)), 10), 60)
            blocks = 15 * requests + i % 50
            if loads and i % 40 == 0:
                loaded = rng.choice((0, 0, rng.randint(1, FULL)))
            seconds = self.true_seconds(requests, blocks) * rng.gauss(1, self.noise)
            cost = LoadCost(self.fixed, self.per_byte).seconds(loaded)
            yield requests, blocks, loaded, seconds + cost


def learnt(machine: Machine, count: int = 1500, loads: bool = True) -> StepModel:
    model: StepModel | None = None
    for requests, blocks, loaded, seconds in machine.steps(count, loads):
        if model is None:
            model = StepModel(requests, blocks, BANDWIDTH, seconds)
        model.learn(requests, blocks, loaded, seconds)
    assert model is not None
    return model


@pytest.mark.parametrize("cost", [(0.0, 0.0), (0.001, 0.0), (0.0, 1e-11), (0.001, 5e-12)])
def test_the_step_with_all_kv_on_the_device_is_predicted(cost: tuple[float, float]) -> None:
    """Within some percent, whatever loads add, for batches unlike the last."""
    machine = Machine(*cost)
    model = learnt(machine)
    for requests in (15, 30, 55):
        true = machine.true_seconds(requests, 15 * requests)
        assert model.seconds(requests, 15 * requests) == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("cost", [(0.001, 0.0), (0.0, 1e-11), (0.001, 5e-12)])
def test_what_loads_cost_is_found(cost: tuple[float, float]) -> None:
    """Of a load of the whole step, in the median of five runs; and it is taken for real."""
    true = LoadCost(*cost).seconds(FULL)
    models = [learnt(Machine(*cost, seed=seed)) for seed in range(5)]
    assert median(m.cost.seconds(FULL) for m in models) == pytest.approx(true, rel=0.25)
    assert median(m.sure_cost.seconds(FULL) for m in models) == pytest.approx(true, rel=0.35)


def test_noise_is_not_taken_for_a_cost() -> None:
    """Where loads cost nothing, next to nothing is believed."""
    models = [learnt(Machine(noise=0.03, seed=seed)) for seed in range(9)]
    believed = [m.sure_cost.seconds(FULL) / 0.02 for m in models]
    assert median(believed) <= 0.002
    assert max(believed) <= 0.03


def test_a_machine_that_gets_slower_is_not_taken_for_a_cost() -> None:
    """Half as fast from one step to the next, without a load: the base moves."""
    machine = Machine()
    model = learnt(machine)
    machine.slower, machine.seed = 2.0, 2
    for step in machine.steps(400, loads=False):
        model.learn(*step)
    true = machine.true_seconds(30, 450)
    assert model.seconds(30, 450) == pytest.approx(true, rel=0.05)
    assert model.sure_cost.seconds(FULL) <= 0.01 * true


def test_one_long_step_moves_little() -> None:
    """A pause of ten steps, as of a machine that does something else."""
    model = learnt(Machine(noise=0.01), count=OFTEN - 1)
    before = model.seconds(30, 450)
    model.learn(30, 450, 0, 10 * before)
    assert before < model.seconds(30, 450) < 1.3 * before


def test_terms_that_change_together_do_not_run_away() -> None:
    """Batch and context grow and shrink as one; steps without noise.

    Kept from falling below nothing, the factor of one drove that of the other up without end.
    """
    model = StepModel(4, 100, BANDWIDTH, 0.0143)
    for size in [*range(4, 40), *range(40, 0, -1)] * 4 + [1] * 300:
        true = 0.01425 + 3e-5 * size + 1e-6 * 11 * size
        model.learn(size, 11 * size, 0, true)
    assert model.seconds(1, 11) == pytest.approx(0.01429, rel=0.02)


def test_before_it_knows_anything_loads_are_free() -> None:
    """And the time of one step is that of the first one."""
    model = StepModel(8, 80, BANDWIDTH, 0.02, request_seconds=1e-3)
    assert model.cost == model.sure_cost == FREE
    assert model.seconds(8, 80) == pytest.approx(0.02)
    assert model.seconds(16, 80) == pytest.approx(0.028)


@pytest.mark.parametrize(("times", "steps"), [(2, 20), (10, 50), (100, 70)])
def test_a_machine_that_is_slower_at_once_is_known_soon(times: int, steps: int) -> None:
    """One long step is passed over as chance; those that follow are learnt from one by one."""
    model = StepModel(2, 60, 1e10, 1e-3)
    for i in range(200):
        model.learn(2, 60 + i % 5, 0, 1e-3)
    for i in range(steps):
        model.learn(2, 60 + i % 5, 0, 1e-3 * times)
    assert model.seconds(2, 60) > 0.7e-3 * times


def test_terms_learnt_from_two_requests_do_not_last_for_thirty() -> None:
    """Scatter of a warm-up may make a request's term negative: 32 of them then take no time."""
    model = StepModel(2, 2, 1e10, 0.074)
    for requests, seconds in ((2, 0.129), (1, 0.2), (2, 0.07), (1, 0.15), (2, 0.06)) * 4:
        model.learn(requests, requests, 0, seconds)
    assert model.seconds(32, 32) < 0.02, "the warm-up no longer misleads"
    for _ in range(4):
        model.learn(32, 32, 0, 0.1)
    assert model.seconds(32, 32) == pytest.approx(0.1, rel=0.05)

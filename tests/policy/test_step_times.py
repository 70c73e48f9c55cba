"""The model of time that benchmarks fit to real steps, for the simulator."""

from __future__ import annotations

import random

import pytest

from benchmarks.harness.step_times import Step, fit, slowed_by_loads
from pie_vllm.policy.traces import Profile

TRUE = Profile(1.0, 0.05, 0.003, 0.0007, 0.0004)


def steps_of(profile: Profile, noise: float, loads: int = 0) -> list[Step]:
    """300 steps of 10 to 32 requests, one in thirty with a prompt."""
    rng = random.Random(7)
    steps = []
    for _ in range(300):
        requests = rng.randint(10, 32)
        blocks, prompt = rng.randint(requests, 3 * requests), rng.choice([0] * 29 + [500])
        seconds = (
            profile.base
            + profile.per_request * requests
            + profile.per_prompt_token * prompt
            + profile.per_block * blocks
            + profile.per_load * loads
        )
        steps.append(
            Step(seconds * rng.uniform(1 - noise, 1 + noise), requests, prompt, blocks, loads)
        )
    return steps


def test_the_fit_finds_the_factors() -> None:
    """Within some percent of the truth, from steps that scatter by five."""
    found = fit(steps_of(TRUE, 0.05))
    true = (TRUE.base, TRUE.per_request, TRUE.per_prompt_token, TRUE.per_block)
    assert found == pytest.approx(true, rel=0.15)


def test_no_factor_is_negative() -> None:
    """Where steps get shorter with a term, the term is left out."""
    steps = [Step(1.0 - 0.01 * n, n, 0, 0, 0) for n in range(1, 20)]
    assert fit(steps)[1] == 0.0
    assert fit(steps)[0] == pytest.approx(0.9, rel=0.05)


def test_what_a_load_costs_is_what_the_model_lacks() -> None:
    """Beyond the stall, shared over the loads."""
    slowed = Profile(1.0, 0.05, 0.003, 0.0007, 0.0004, per_load=0.001)
    steps = steps_of(slowed, 0.0, loads=20)
    assert slowed_by_loads(TRUE, steps, 0.0) == pytest.approx(0.001)
    assert slowed_by_loads(TRUE, steps, 3.0) == pytest.approx(0.0005)
    assert slowed_by_loads(TRUE, steps_of(TRUE, 0.0, loads=20), 0.0) == pytest.approx(0.0)

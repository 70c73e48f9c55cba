"""The model of time that benchmarks fit to real steps, for the simulator."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.real.agreement import add_simulated
from benchmarks.real.step_times import Step, fit, slowed_by_loads
from pie_vllm.simulation.simulator import run_stock
from pie_vllm.simulation.traces import Job, Profile

TRUE = Profile(1.0, 0.05, 0.003, 0.0007, 0.0004)


def steps_of(profile: Profile, noise: float, loads: int = 0) -> list[Step]:
    """300 steps of 10 to 32 requests, one in thirty with a prompt."""
    rng = random.Random(7)
    steps = []
    for _ in range(300):
        requests = rng.randint(10, 32)
        blocks, prompt = rng.randint(requests, 3 * requests), rng.choice([0] * 29 + [500])
        seconds = profile.step_seconds(requests, prompt, blocks) + profile.load_cost(loads)
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


def test_real_runs_are_played_again() -> None:
    """Stock's with the fitted model, pie's with its own sizes, link and cost of loads."""
    slowed = Profile(1.0, 0.05, 0.003, 0.0007, 0.0004, per_load=0.001)
    limits = {"prompts": [40] * 32, "max_running": 64, "max_tokens": 512}
    sizes = {"num_layers": 30, "page_bytes": 1000, "resident_blocks": 30, "pooled_blocks": 60}
    llm, load = {"block_size": 16}, {"tokens": 30}
    specs = {
        "stock_equal": {"pie": None, "llm": llm, "load": load},
        "pie": {"pie": {"target_slowdown": 0.01}, "llm": llm, "load": load},
        "pie_idle": {"pie": {"target_slowdown": 0.01}, "llm": llm, "load": load},
    }
    traces = {
        "stock_equal": steps_of(TRUE, 0.0),
        "pie": [s._replace(seconds=s.seconds + 0.002) for s in steps_of(slowed, 0.0, loads=20)],
        "pie_idle": steps_of(TRUE, 0.0),
    }
    figures: dict[str, list[dict[str, Any]]] = {
        name: [
            {
                "trace": {"steps": steps, **limits},
                "tok_s": 100.0,
                "num_blocks": 40,
                "stall_seconds": 0.6 if name == "pie" else 0.0,
                "load_seconds": 12.0 if name == "pie" else 0.0,
                "bandwidth_gbps": 1.0 if name == "pie" else float("inf"),
                "pie": {**sizes, "ring_slots": 3, "rows": 60},
            }
        ]
        for name, steps in traces.items()
    }
    add_simulated(figures, specs)
    stock, pie, idle = (figures[name][0] for name in specs)
    jobs = [Job(0.0, 40, 30)] * 32
    expected = run_stock(40, TRUE, jobs, block_size=16, max_running=64, max_tokens=512)
    assert stock["simulated_tok_s"] == pytest.approx(expected.throughput, rel=0.01)
    assert pie["profile"]["per_load"] == pytest.approx(0.001, rel=0.01)
    assert pie["profile"]["exposed"] == pytest.approx(0.05)
    assert pie["simulated_tok_s"] > 1.05 * stock["simulated_tok_s"]
    assert idle["simulated_tok_s"] > pie["simulated_tok_s"], "a link without end"
    for run in (stock, pie, idle):
        assert run["to_simulated"] == 100.0 / run["simulated_tok_s"]
    assert all("trace" not in run for runs in figures.values() for run in runs)

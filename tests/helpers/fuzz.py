"""Random schedulers and loads by seed."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from pie_vllm.policy.geometry import Geometry
from tests.helpers import scheduling
from tests.helpers.scheduling import Driver, make_request, random_load

BLOCK_SIZE = 16


class Case(NamedTuple):
    """One random case: sizes, scheduler options, and the way requests come and go."""

    geometry: Geometry
    options: dict[str, Any]
    limit: int
    load: list[tuple[list[int], int]]
    left_out: float
    rng: random.Random


def random_case(seed: int, *, asynchronous: bool | None = None, **sizes: int) -> Case:
    """Tiny tiers, so that everything is full most of the time."""
    rng = random.Random(seed)
    pooled = rng.randint(1, 40)
    geometry = scheduling.geometry(
        rng.randint(4, 20), pooled, pooled + rng.choice([0, 0, rng.randint(1, 9)]), **sizes
    )
    capacity = (geometry.num_blocks - 1) * BLOCK_SIZE
    budget = rng.choice([16, 32, 64, 256, 1024])
    options = {
        "async_scheduling": rng.random() < 0.5 if asynchronous is None else asynchronous,
        "enable_prefix_caching": rng.random() < 0.6,
        "max_num_batched_tokens": budget,
        "max_num_scheduled_tokens": budget,
        "max_num_seqs": rng.choice([2, 8, 32]),
        "max_model_len": capacity,
        "long_prefill_token_threshold": rng.choice([0, 0, 0, 8, 40]),
        "policy": rng.choice(["fcfs", "fcfs", "priority"]),
    }
    longest = max(1, min(rng.choice([10, 50, capacity // 2, capacity - 10]), capacity - 20))
    answer = max(1, min(60, capacity - longest - 1))
    load = random_load(rng, rng.randint(1, 30), longest, answer, rng.randint(0, 3))
    limit = rng.choice([pooled, pooled, 0, pooled // 2])
    left_out = rng.choice([0.0, 0.0, 0.3])
    return Case(geometry, options, limit, load, left_out, rng)


def leave_out(driver: Driver, rng: random.Random, share: float) -> None:
    """Leave a share of the running requests out of the next step, but never all of them."""
    running = list(driver.scheduler.running)
    for request in running[1:]:
        if rng.random() < share:
            step = driver.scheduler.current_step + 2
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, step)


def play(driver: Driver, case: Case, most_idle: int = 20, aborts: float = 0.02) -> None:
    """Let all requests of a case come, run, be aborted at times, and end.

    Raises:
        AssertionError: no progress, a wrong page, a wrong answer, or a block left over.
    """
    rng, scheduler = case.rng, driver.scheduler
    pending = list(enumerate(case.load))
    while pending or scheduler.has_requests() or driver.queue:
        while pending and rng.random() < 0.3:
            number, (prompt, count) = pending.pop(0)
            priority = rng.randint(0, 2)
            driver.add(make_request(f"r{number}", prompt, count, BLOCK_SIZE, priority))
        live = [r for r in driver.answers if r in scheduler.requests]
        if live and rng.random() < aborts:
            driver.abort(rng.choice(live))
        if case.left_out:
            leave_out(driver, rng, case.left_out)
        driver.step()
        assert driver.idle <= most_idle, "no progress: the scheduler runs nothing"
    driver.verify()
    manager = scheduler.kv_cache_manager
    manager.residency.begin_step()
    assert manager.usage == 0.0
    assert manager.residency.pooled_in_use == 0
    assert manager.reset_prefix_cache()
    manager.residency.check_integrity()

"""Streaming-input sessions: the next piece of one that holds blocks is admitted on pie's terms."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.helpers import scheduling
from tests.helpers.deciders import Wavering
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import continuation

pytestmark = pytest.mark.vllm


def say(driver: Driver, name: str, piece: list[int], count: int) -> list[int]:
    """Send a piece of a session; returns the answer wanted, once the session has it, too."""
    session = driver.scheduler.requests.get(name)
    known = [] if session is None else list(session.all_token_ids)[: session.num_computed_tokens]
    request = make_request(name, piece, count, BLOCK_SIZE, resumable=True)
    if session is None:
        driver.add(request)
    else:
        driver.answers[name].clear()
        driver.scheduler.add_request(request)
    return continuation([*known, *piece], count)


def paused(driver: Driver, name: str) -> bool:
    """Whether a session waits for its next piece, and nothing is in flight."""
    status: Any = driver.scheduler.requests[name].status
    return bool(status == RequestStatus.WAITING_FOR_STREAMING_REQ) and not driver.queue


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_the_next_piece_of_a_session_may_exceed_the_residents(
    asynchronous: bool, caching: bool
) -> None:
    """A piece of 40 blocks over 19 residents runs, as a fresh prompt of that length does.

    The session's own first blocks are pooled meanwhile, and a request behind it is served.
    """
    driver = make_driver(
        scheduling.geometry(20, 60),
        max_model_len=60 * BLOCK_SIZE,
        enable_prefix_caching=caching,
        async_scheduling=asynchronous,
    )
    scheduler, residency = driver.scheduler, driver.scheduler.kv_cache_manager.residency
    for piece in ([3] * 100, list(range(40 * BLOCK_SIZE)), [5, 6, 7]):
        wanted = say(driver, "session", piece, 4)
        driver.run_until(lambda: paused(driver, "session"))
        assert driver.answers["session"] == wanted
    assert residency.demotions > 0
    driver.add(make_request("behind", [9] * 30, 5, BLOCK_SIZE))
    driver.run_until(lambda: "behind" not in scheduler.requests)
    assert driver.answers["behind"] == continuation([9] * 30, 5)
    driver.abort("session")
    assert not residency.tables
    assert residency.queue.free_in_all == driver.scheduler.kv_cache_manager.geometry.num_blocks - 1


@pytest.mark.parametrize("seed", range(6))
def test_random_sessions_among_requests(seed: int) -> None:
    """Right pages and answers while sessions pause, go on and leave, whatever the link decides."""
    rng = random.Random(seed)
    resident, pooled = rng.randint(8, 24), rng.randint(50, 70)
    driver = make_driver(
        scheduling.geometry(resident, pooled, pooled + rng.choice([0, 40])),
        decider=Wavering(pooled, seed),
        max_model_len=50 * BLOCK_SIZE,
        enable_prefix_caching=rng.random() < 0.5,
        policy=rng.choice(["fcfs", "priority"]),
        watermark=rng.choice([0.0, 0.1]),
    )
    scheduler = driver.scheduler
    left = {f"s{n}": rng.randint(2, 5) for n in range(3)}
    wanted: dict[str, list[int]] = {}
    plain = 0
    while left or scheduler.has_requests():
        for name in list(left):
            live = name in scheduler.requests
            if live and not paused(driver, name):
                continue
            if live:
                assert driver.answers[name] == wanted[name]
            if not left[name]:
                driver.abort(name)
                del left[name]
            elif rng.random() < 0.3:
                left[name] -= 1
                piece = [rng.randrange(997) for _ in range(rng.randint(1, 30))]
                count = rng.randint(1, 8)
                wanted[name] = say(driver, name, piece * rng.randint(1, 3), count)
        if plain < 20 and rng.random() < 0.2:
            prompt = [rng.randrange(997) for _ in range(rng.randint(1, 200))]
            driver.add(make_request(f"r{plain}", prompt, rng.randint(1, 40), BLOCK_SIZE))
            plain += 1
        driver.step()
        assert driver.idle <= 30, "no progress"
        assert driver.steps < 3000
    for name in list(wanted):
        driver.prompts.pop(name, None)
    driver.verify()
    assert not scheduler.kv_cache_manager.residency.tables

"""Streaming-input sessions: the next piece of one that holds blocks is admitted on pie's terms."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.helpers import scheduling
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

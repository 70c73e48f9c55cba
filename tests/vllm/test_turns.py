"""What the budget and the limit do to vLLM's real schedulers: turns, admission, promotion."""

from __future__ import annotations

import pytest

from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.scheduling import make_request

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("whole", [True, False])
def test_a_limit_of_zero_admits_what_fits_the_residents(whole: bool) -> None:
    """The limit is about pooled blocks; free residents are not held back."""
    driver = make_driver(
        scheduling.geometry(40, 100),
        decider=Fixed(0, 100),
        max_model_len=200,
        scheduler_reserve_full_isl=whole,
    )
    scheduler = driver.scheduler
    for number in range(24):
        driver.add(make_request(f"r{number}", [number, *range(40)], 6, BLOCK_SIZE))
    driver.step()
    driver.step()
    assert len(scheduler.running) == 13, "three blocks each, of 39"
    assert scheduler.kv_cache_manager.residency.pooled_in_use == 0
    driver.run()
    driver.verify()
    assert not driver.preemptions


def test_requests_that_wait_for_the_link_do_not_hold_the_residents() -> None:
    """Where their tails would be a fifth of all residents, vLLM preempts as without a pool."""
    driver = make_driver(scheduling.geometry(20, 60), decider=Fixed(1, 1), max_model_len=200)
    scheduler = driver.scheduler
    for number in range(12):
        driver.add(make_request(f"r{number}", [number, *range(number % 5)], 40, BLOCK_SIZE))
    fewest = 12
    while scheduler.has_requests():
        driver.step()
        ran, running = len(driver.output.num_scheduled_tokens), len(scheduler.running)
        fewest = min(fewest, ran + 6 - running) if running else fewest
    driver.verify()
    assert driver.preemptions
    assert fewest >= 0, "hardly more than a fifth of the residents wait"


def test_requests_take_turns_within_the_budget() -> None:
    """With two thirds of the link that is needed all requests go on, residents in every step."""
    driver = make_driver(scheduling.geometry(80, 80), decider=Fixed(80, 40), max_model_len=400)
    scheduler = driver.scheduler
    for number in range(14):
        prompt = [(number * 31 + token) % 997 for token in range(120)]
        driver.add(make_request(f"r{number}", prompt, 40, BLOCK_SIZE))
    residency = scheduler.kv_cache_manager.residency
    loaded, gaps, since = [], [], dict.fromkeys((f"r{i}" for i in range(14)), 0)
    while scheduler.has_requests():
        demoted = residency.demotions
        driver.step()
        # What is demoted in a step is chosen after who runs in it.
        loaded.append(residency.read_set.num_blocks - (residency.demotions - demoted))
        for request in scheduler.running:
            name = request.request_id
            since[name] = 0 if name in driver.output.num_scheduled_tokens else since[name] + 1
            gaps.append(since[name])
    driver.verify()
    assert not driver.preemptions
    assert scheduler.pie_controller.turns.left_out > 0
    assert 0 < max(loaded) <= 40
    assert max(gaps) <= 14


def test_what_waits_for_the_link_comes_back_before_others_are_admitted() -> None:
    """On a link that feeds nothing, free residents go to pooled requests, then to waiting ones."""
    driver = make_driver(scheduling.geometry(30, 40), max_model_len=400)
    scheduler = driver.scheduler
    residency = scheduler.kv_cache_manager.residency
    for name, length, answer in (("a", 300, 60), ("b", 70, 90), ("c", 70, 90)):
        driver.add(make_request(name, [ord(name), *range(length)], answer, BLOCK_SIZE))
    while residency.pooled_in_use < 4:
        driver.step()
    scheduler.pie_controller.decider = Fixed(0, 2)
    driver.add(make_request("waiting", list(range(500, 520)), 5, BLOCK_SIZE))
    paused = 0
    while "waiting" not in {r.request_id for r in scheduler.running}:
        pooled, free = residency.pooled_in_use, residency.queue.free_residents
        driver.step()
        paused += len(driver.output.num_scheduled_tokens) < len(scheduler.running)
    assert paused > 5
    assert free >= pooled + 2
    assert residency.promotions > 0
    driver.run()
    driver.verify()
    assert not driver.preemptions

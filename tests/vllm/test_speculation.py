"""Speculation over vLLM's schedulers and a runner of tags, which writes the drafts' positions, too.

What is rejected is written again: a block that holds such a position must be neither pooled, nor
parked, nor kept as a preempted request's tail.
"""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from pie_vllm.errors import ConfigError
from pie_vllm.policy.speculation import DraftsInFlight, Speculation
from pie_vllm.vllm.speculation import (
    check_residents,
    speculation_of,
    takes_turns,
    written_blocks,
)
from tests.helpers.deciders import Fixed
from tests.helpers.drafts import hasty_blocks
from tests.helpers.fuzz import make_driver, play, random_drafts
from tests.helpers.scheduling import geometry, make, make_request

pytestmark = pytest.mark.vllm


def run(seed: int, *, asynchronous: bool | None = None) -> Counter[str]:
    """Play one random case; returns how often what happened."""
    case = random_drafts(seed, asynchronous=asynchronous)
    driver = make_driver(case.geometry, case.memory(), case.decider(), case.pool(), **case.options)
    play(driver, case)
    residency, runner = driver.scheduler.kv_cache_manager.residency, driver.runner
    assert not driver.scheduler.kv_cache_manager.drafts.by_request, "a draft is never taken back"
    return Counter(
        demotions=residency.demotions,
        promotions=residency.promotions,
        preemptions=len(driver.preemptions),
        parked=residency.parking.parked_blocks,
        restored=residency.parking.restored_blocks,
        accepted=runner.accepted,
        rejected=runner.rejected,
    )


@pytest.mark.fuzz
def test_every_page_read_is_right(fuzz_seeds: range) -> None:
    """With one and with two steps in flight, whatever is accepted."""
    total: Counter[str] = Counter()
    for seed in fuzz_seeds:
        total += run(seed)
    for what in ("accepted", "rejected", "demotions"):
        assert total[what] > 10 * len(fuzz_seeds), what
    for what in ("promotions", "preemptions", "parked", "restored"):
        assert total[what] > len(fuzz_seeds), what


def foreign(asynchronous: bool) -> None:
    """Assert that one of some cases reads or writes KV where it must not."""
    for seed in range(24):
        try:
            run(seed, asynchronous=asynchronous)
        except AssertionError as error:
            if "foreign KV" not in str(error) and "into a pooled block" not in str(error):
                raise
            return
    pytest.fail("24 seeds did not notice")


def test_a_block_with_a_rejected_tail_is_noticed() -> None:
    """Negative control: all tokens of a step are counted as computed when it is scheduled."""
    end = hasty_blocks()
    try:
        foreign(asynchronous=False)
    finally:
        end()


def test_a_placeholder_counted_as_accepted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a step in flight its drafts are taken for accepted."""
    monkeypatch.setattr(DraftsInFlight, "uncertain", lambda *_: 0)
    foreign(asynchronous=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_running_requests_ask_is_what_the_step_takes(asynchronous: bool) -> None:
    """Tokens with drafts, and blocks with the slots behind them, as vLLM then allocates them."""
    scheduler_options = {"async_scheduling": asynchronous, "drafts": (5, 5)}
    driver = make_driver(geometry(64, 8), chance=0.7, **scheduler_options)
    scheduler = driver.scheduler
    rng = random.Random(1)
    for number in range(6):
        driver.add(make_request(f"r{number}", [number] * rng.randint(1, 30), 60, 16))
    driver.run_until(lambda: len(scheduler.running) == 6)
    tables = scheduler.kv_cache_manager.residency.tables
    blocks = 0
    for _ in range(30):
        if any(r.is_prefill_chunk for r in scheduler.running) or len(scheduler.running) < 6:
            break
        asked, held = scheduler._view.asked(), sum(map(len, tables.values()))
        driver.step()
        assert driver.output.total_num_scheduled_tokens == asked.decodes
        if len(tables) == 6:
            assert sum(map(len, tables.values())) - held == asked.due
            blocks += asked.due
    assert blocks > 3
    driver.run()
    driver.verify()


def config(**settings: Any) -> Any:
    """What is asked of a VllmConfig."""
    found = {
        "speculative_config": object(),
        "use_v2_model_runner": False,
        "num_speculative_tokens": 3,
        "num_lookahead_tokens": 3,
        "num_prefill_lookahead_tokens": 0,
        "async_scheduling": False,
        "max_concurrent_batches": 1,
        **settings,
    }
    return SimpleNamespace(scheduler_config=SimpleNamespace(**found), **found)


def test_sizes_are_vllms() -> None:
    """Drafts, slots behind them, and what several modules of a draft model write again."""
    assert speculation_of(config()) == Speculation(3, 3, 0)
    assert speculation_of(config(num_prefill_lookahead_tokens=1)).rewritten == 0
    assert speculation_of(config(num_prefill_lookahead_tokens=3)).rewritten == 2
    assert speculation_of(config(speculative_config=None)) == Speculation()


def test_a_device_without_room_for_what_is_written_is_refused() -> None:
    """Two steps of four tokens and three slots behind them touch two blocks of 16, or three."""
    assert written_blocks(config(speculative_config=None), 16) == 0
    two_steps = config(max_concurrent_batches=2)
    assert (written_blocks(config(), 16), written_blocks(two_steps, 8)) == (2, 3)
    check_residents(two_steps, 4, 8)
    with pytest.raises(ConfigError, match=r"--speculative-config with 3 tokens.* 3 KV blocks.*2"):
        check_residents(two_steps, 3, 8)


def test_no_turns_where_the_runner_forgets_who_is_left_out() -> None:
    """V1 does, of states and with asynchronous schedules; V2 has a slot for each request."""
    assert takes_turns(config(), has_states=False)
    assert not takes_turns(config(), has_states=True)
    assert not takes_turns(config(async_scheduling=True), has_states=False)
    v2 = config(async_scheduling=True, use_v2_model_runner=True)
    assert takes_turns(v2, has_states=True)
    assert takes_turns(config(speculative_config=None, async_scheduling=True), has_states=True)


def test_where_nobody_may_be_left_out_nothing_more_is_pooled_than_a_step_loads() -> None:
    """vLLM preempts instead, and all that run run in every step."""
    sizes = geometry(12, 40)
    scheduler = make(sizes, drafts=(3, 0), async_scheduling=True)
    assert not scheduler.pie_controller.turns.allowed
    assert make(sizes, drafts=(3, 0)).pie_controller.turns.allowed
    limit = 4
    for allowed in (False, True):
        decider = Fixed(limit, limit)
        driver = make_driver(sizes, decider=decider, drafts=(3, 0), async_scheduling=not allowed)
        turns = driver.scheduler.pie_controller.turns
        for number in range(4):
            driver.add(make_request(f"r{number}", [number] * 40, 120, 16))
        most = 0
        while driver.scheduler.has_requests() or driver.queue:
            driver.step()
            most = max(most, driver.scheduler.kv_cache_manager.residency.pooled_in_use)
        driver.verify()
        assert bool(turns.left_out) is allowed
        assert driver.preemptions or allowed
        assert (most <= limit + 4) is not allowed, most

"""vLLM's real schedulers over tiny tiers: right pages, right answers, always progress."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from pie_vllm.policy.geometry import Geometry
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, Case, play, random_case
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import DictMemory, TagRunner

pytestmark = pytest.mark.vllm


def make_driver(
    sizes: Geometry,
    memory: DictMemory | None = None,
    decider: Fixed | None = None,
    **options: Any,
) -> Driver:
    """A scheduler over the sizes, with as many steps in flight as its kind has."""
    scheduler = scheduling.make(sizes, BLOCK_SIZE, **options)
    scheduler.pie_decider = decider or scheduler.pie_decider
    runner = TagRunner(memory or DictMemory(sizes, BLOCK_SIZE), BLOCK_SIZE)
    return Driver(scheduler, runner, in_flight=1 + options.get("async_scheduling", False))


def driver_of(case: Case, memory: DictMemory | None = None) -> Driver:
    """The driver of a random case."""
    return make_driver(case.geometry, memory, case.decider(), **case.options)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_random_loads_make_progress_and_read_right_pages(fuzz_seeds: range) -> None:
    """No deadlock, no foreign page, and no preemption while what was asked for is free."""
    demotions = promotions = preemptions = 0
    for seed in fuzz_seeds:
        case = random_case(seed)
        driver = driver_of(case)
        try:
            play(driver, case)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        # A link that cannot feed the pooled requests is a reason, too, to demote no more.
        early = [p for p in driver.preemptions if p.free >= p.asked and not p.frozen]
        assert not early, f"seed {seed}: preempted with room left: {early[:3]}"
        residency = driver.scheduler.kv_cache_manager.residency
        demotions += residency.demotions
        promotions += residency.promotions
        preemptions += len(driver.preemptions)
    assert demotions > 20 * len(fuzz_seeds)
    assert promotions > 0
    assert preemptions > 0


@pytest.mark.parametrize("limit", [0, 60])
def test_a_prompt_longer_than_the_residents_is_served(limit: int) -> None:
    """One request may fill both tiers, whatever the admission limit."""
    driver = make_driver(
        scheduling.geometry(6, 60),
        decider=Fixed(limit, 60),
        max_model_len=64 * 16,
        max_num_batched_tokens=256,
    )
    prompt = [random.Random(1).randrange(997) for _ in range(900)]
    driver.add(make_request("long", prompt, 100, BLOCK_SIZE))
    driver.run()
    driver.verify()
    assert len(driver.answers["long"]) == 100
    assert not driver.preemptions


def test_a_request_left_out_at_the_end_of_a_block_finds_a_resident() -> None:
    """Waiting requests may not take the residents that a left-out request needs next."""
    driver = make_driver(scheduling.geometry(4, 20), max_model_len=20 * 16)
    scheduler = driver.scheduler
    driver.add(make_request("first", list(range(15)), 40, BLOCK_SIZE))
    driver.step()
    driver.step()
    request = scheduler.requests["first"]
    assert request.num_computed_tokens == 16
    request.next_decode_eligible_step = scheduler.current_step + 2
    for name in ("b", "c", "d"):
        driver.add(make_request(name, [1, 2, 3, ord(name)], 30, BLOCK_SIZE))
    driver.step()
    assert [r.request_id for r in scheduler.running] == ["first", "b", "c"]
    driver.run()
    driver.verify()
    assert not driver.preemptions


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_smallest_tiers_serve_many_requests(asynchronous: bool) -> None:
    """Four residents, one pooled block, limit zero: all requests get their answers."""
    driver = make_driver(
        scheduling.geometry(4, 1),
        decider=Fixed(0, 1),
        max_model_len=64,
        async_scheduling=asynchronous,
        max_num_seqs=8,
    )
    for number in range(12):
        driver.add(make_request(f"r{number}", list(range(number, number + 30)), 30, BLOCK_SIZE))
    driver.run()
    driver.verify()
    assert all(len(answer) == 30 for answer in driver.answers.values())


def test_usage_counts_both_tiers_and_a_reset_waits_for_all_blocks() -> None:
    """vLLM's two views of the free blocks are right while some are pooled."""
    sizes = scheduling.geometry(6, 10)
    driver = make_driver(sizes, max_model_len=200)
    manager = driver.scheduler.kv_cache_manager
    driver.add(make_request("one", list(range(100)), 40, BLOCK_SIZE))
    while len(driver.answers["one"]) < 20:
        driver.step()
    assert manager.residency.pooled_in_use > 0
    blocks = len(manager.residency.tables["one"])
    assert manager.usage == pytest.approx(blocks / (sizes.num_blocks - 1))
    assert not manager.reset_prefix_cache()
    driver.run()
    assert manager.usage == 0.0
    assert manager.reset_prefix_cache()


def pooled_beside_another(sizes: Geometry) -> Driver:
    """A request that holds blocks and ends soon, and one whose first blocks are pooled."""
    driver = make_driver(sizes, max_model_len=200)
    scheduler = driver.scheduler
    driver.add(make_request("other", list(range(100, 180)), 15, BLOCK_SIZE))
    driver.add(make_request("long", list(range(66)), 40, BLOCK_SIZE))
    while len(driver.answers["long"]) < 2:
        driver.step()
    assert "other" in scheduler.requests
    ids = [b.block_id for b in scheduler.kv_cache_manager.residency.tables["long"]]
    assert any(i >= sizes.resident_blocks for i in ids)
    return driver


def test_a_demoted_prefix_is_still_hit() -> None:
    """The prefix cache follows a block into the pool, in use and idle."""
    sizes = scheduling.geometry(10, 20)
    driver = pooled_beside_another(sizes)
    driver.add(make_request("again", [*range(66), 7], 3, BLOCK_SIZE))
    driver.step()
    assert driver.output.scheduled_new_reqs[0].num_computed_tokens == 64
    driver.abort("long")
    driver.abort("again")
    driver.add(make_request("later", [*range(66), 8], 3, BLOCK_SIZE))
    driver.step()
    assert driver.output.scheduled_new_reqs[0].num_computed_tokens == 64
    driver.run()
    driver.verify()


def test_a_block_is_not_promoted_under_a_request_that_just_came() -> None:
    """A new request's table is sent before promotions are chosen, so its blocks stay this step."""
    sizes = scheduling.geometry(10, 20)
    driver = pooled_beside_another(sizes)
    while "other" in driver.scheduler.requests:
        driver.step()
    residency = driver.scheduler.kv_cache_manager.residency
    assert residency.promotions == 0
    driver.add(make_request("again", [*range(66), 7], 9, BLOCK_SIZE))
    driver.step()
    assert driver.output.scheduled_new_reqs[0].num_computed_tokens == 64
    assert residency.queue.free_residents > 2, "there is room for promotion"
    driver.run()
    driver.verify()
    assert residency.promotions > 0


class _SkipsLoads(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        super().run(plan and plan._replace(loads=(), promotions=()), work)


class _SkipsStores(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        super().run(plan and plan._replace(stores=()), work)


class _SkipsPromotions(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        super().run(plan and plan._replace(promotions=()), work)


@pytest.mark.parametrize("memory", [_SkipsLoads, _SkipsStores, _SkipsPromotions])
def test_a_memory_that_skips_copies_is_noticed(memory: Callable[..., DictMemory]) -> None:
    """Negative control: without loads, stores or promotions some page is foreign."""
    for seed in range(60):
        case = random_case(seed)
        try:
            play(driver_of(case, memory(case.geometry, BLOCK_SIZE)), case)
        except AssertionError as error:
            if "foreign KV" not in str(error):
                raise
            return
    pytest.fail("sixty seeds did not notice")


def test_a_lost_relabel_is_noticed() -> None:
    """Negative control: a block table that misses a relabel names a foreign page."""
    for seed in range(60):
        case = random_case(seed)
        driver = driver_of(case)
        execute = driver.runner.execute

        def forgetful(output: Any, execute: Any = execute) -> Any:
            if output.pie_plan is not None:
                output.pie_plan = output.pie_plan._replace(relabels=())
            return execute(output)

        driver.runner.execute = forgetful  # type: ignore[method-assign]
        try:
            play(driver, case)
        except AssertionError as error:
            if "foreign KV" not in str(error) and "pooled block" not in str(error):
                raise
            return
    pytest.fail("sixty seeds did not notice")


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
        loaded.append(residency.reading.num_blocks - (residency.demotions - demoted))
        for request in scheduler.running:
            name = request.request_id
            since[name] = 0 if name in driver.output.num_scheduled_tokens else since[name] + 1
            gaps.append(since[name])
    driver.verify()
    assert not driver.preemptions
    assert scheduler.pie_turns.left_out > 0
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
    scheduler.pie_decider = Fixed(0, 2)
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

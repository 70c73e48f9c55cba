"""vLLM's real schedulers over tiny tiers: right pages, right answers, always progress."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers import scheduling
from tests.helpers.fuzz import BLOCK_SIZE, Case, play, random_case
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import DictMemory, TagRunner

pytestmark = pytest.mark.vllm


def driver_of(case: Case, memory: DictMemory | None = None) -> Driver:
    scheduler = scheduling.make(case.geometry, BLOCK_SIZE, **case.options)
    scheduler.kv_cache_manager.limit = case.limit
    memory = memory or DictMemory(case.geometry, BLOCK_SIZE)
    in_flight = 2 if case.options["async_scheduling"] else 1
    return Driver(scheduler, TagRunner(memory, BLOCK_SIZE), in_flight=in_flight)


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
        early = [p for p in driver.preemptions if p.free >= p.asked]
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
    sizes = scheduling.geometry(6, 60)
    scheduler = scheduling.make(
        sizes, BLOCK_SIZE, max_model_len=64 * 16, max_num_batched_tokens=256
    )
    scheduler.kv_cache_manager.limit = limit
    driver = Driver(scheduler, TagRunner(DictMemory(sizes, BLOCK_SIZE), BLOCK_SIZE))
    prompt = [random.Random(1).randrange(997) for _ in range(900)]
    driver.add(make_request("long", prompt, 100, BLOCK_SIZE))
    driver.run()
    driver.verify()
    assert len(driver.answers["long"]) == 100
    assert not driver.preemptions


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

"""vLLM's real schedulers over tiny tiers: right pages, right answers, always progress."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS
from pie_vllm.policy.admission.candidate import Claims
from pie_vllm.policy.admission.lookup import ParkedLookup
from pie_vllm.policy.control.elastic_pool import FREE_MARGIN, ElasticPool
from pie_vllm.vllm.scheduler_side.schedule_view import ScheduleView
from tests.helpers import fuzz, scheduling
from tests.helpers.broken_memory import SkipsPromotions, SkipsStores
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, Case, make_driver, play, random_case
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import DictMemory

pytestmark = pytest.mark.vllm


def driver_of(case: Case, memory: DictMemory | None = None) -> Driver:
    """The driver of a random case."""
    memory = memory or case.memory()
    return make_driver(case.geometry, memory, case.decider(), case.pool(), **case.options)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_random_loads_make_progress_and_read_right_pages(fuzz_seeds: range) -> None:
    """No foreign page, and no preemption while what was asked for is free.

    No deadlock: in 20 steps, and twice those in which the longest request can be computed again,
    some request gets further than it ever was (``Case.most_without_progress``); at most 20 steps
    in a row run nothing. No leak: at the end all ids are free, all rows free or parked under a key.
    """
    demotions = promotions = preemptions = parked = restored = 0
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
        parked += residency.parking.parked_blocks
        restored += residency.parking.restored_blocks
    assert demotions > 20 * len(fuzz_seeds)
    assert promotions > 0
    assert preemptions > 0
    assert parked > 10 * len(fuzz_seeds)
    assert restored > len(fuzz_seeds)


def test_a_deadlock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: where running requests claim all residents, nobody is admitted."""
    monkeypatch.setattr(ScheduleView, "claims", lambda _: Claims(tails=1000))
    case = random_case(0)
    with pytest.raises(AssertionError, match=r"no progress.*(runs nothing|, 0 requests)"):
        play(driver_of(case), case)


def test_a_livelock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: requests preempted in every step run all the time and get nowhere."""

    def preempt_all(driver: Driver, _: Case) -> None:
        scheduler = driver.scheduler
        while scheduler.running:
            scheduler._preempt_request(scheduler.running.pop(), 0.0)

    monkeypatch.setattr(fuzz, "disturb", preempt_all)
    case = random_case(0, asynchronous=False)
    case.options.update(
        enable_prefix_caching=False,
        parking="off",
        max_num_scheduled_tokens=16,
        max_num_batched_tokens=16,
    )
    with pytest.raises(AssertionError, match=r"no progress in \d+ steps"):
        play(driver_of(case), case)


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


def waits_for_its_parked_kv() -> Driver:
    """A request that runs for long, and a chat that comes back, whose seven blocks are parked."""
    driver = make_driver(
        scheduling.geometry(16, 10),
        decider=Fixed(10, restore_blocks_max=1),
        max_model_len=200,
        enable_prefix_caching=True,
    )
    chat = [random.Random(1).randrange(997) for _ in range(112)]
    driver.add(make_request("before", chat, 2, BLOCK_SIZE))
    driver.run()
    driver.add(make_request("other", [random.Random(2).randrange(997)] * 180, 2, BLOCK_SIZE))
    driver.run()
    driver.add(make_request("beside", [5, 6, 7], 150, BLOCK_SIZE))
    driver.step()
    driver.add(make_request("again", [*chat, 5], 3, BLOCK_SIZE))
    assert len(driver.scheduler.kv_cache_manager.residency.parking) >= 4
    return driver


def steps_of_waiting(driver: Driver) -> int:
    """Until the chat that came back runs."""
    began = driver.steps
    while not driver.answers["again"]:
        driver.step()
        assert "beside" in driver.scheduler.requests, "it waited for the other's end"
    driver.run()
    driver.verify()
    return driver.steps - began


def test_parked_kv_comes_back_a_block_a_step_beside_others() -> None:
    """As many steps as blocks are parked, about."""
    driver = waits_for_its_parked_kv()
    restored = driver.scheduler.kv_cache_manager.residency.parking.restored_blocks
    driver.step()
    assert not driver.answers["again"]
    waited = driver.scheduler.pie_waits.steps["restore"]
    steps_of_waiting(driver)
    found = driver.scheduler.kv_cache_manager.residency.parking.restored_blocks - restored
    assert found >= 4
    assert waited == 1
    assert driver.scheduler.pie_waits.steps["restore"] <= found


@pytest.mark.parametrize("path", ["part", "cut"])
def test_no_restore_keeps_a_request_waiting_for_ever(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks lose their places as fast as they come, or the next one is always on its way.

    It waits for as many steps as it has blocks, and is then admitted beside the other.
    """
    driver = waits_for_its_parked_kv()
    if path == "part":
        monkeypatch.setattr("pie_vllm.policy.admission.transaction.restore_part", lambda *_: [])
    else:
        monkeypatch.setattr(ParkedLookup, "_coming", lambda *_: True)
    blocks = -(-113 // BLOCK_SIZE)
    steps_of_waiting(driver)
    assert driver.scheduler.pie_waits.steps["restore"] == blocks


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


def test_a_request_waits_where_memory_for_its_rows_is_short() -> None:
    """As for any other want of blocks: it is admitted when it fits, and nobody is preempted."""
    sizes = scheduling.geometry(12, 40)
    ticks = itertools.count(0.0, 2.0)
    pool = ElasticPool(sizes, 1, lambda: FREE_MARGIN, lambda: next(ticks))
    driver = make_driver(
        sizes, decider=Fixed(40), pool=pool, max_model_len=600, max_num_batched_tokens=32
    )
    driver.add(make_request("first", list(range(200)), 30, BLOCK_SIZE))
    while len(driver.answers["first"]) < 5:
        driver.step()
    assert pool.scarce
    driver.add(make_request("second", list(range(300, 400)), 30, BLOCK_SIZE))
    while "first" in driver.scheduler.requests:
        assert "second" not in {r.request_id for r in driver.scheduler.running}
        driver.step()
    driver.run()
    driver.verify()
    assert not driver.preemptions


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
        super().run(plan and plan._replace(loads=NO_RUNS, promotions=NO_RUNS), work)


@pytest.mark.parametrize("memory", [_SkipsLoads, SkipsStores, SkipsPromotions])
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
            if output.pie.plan is not None:
                output.pie = output.pie._replace(plan=output.pie.plan._replace(relabels=()))
            return execute(output)

        driver.runner.execute = forgetful  # type: ignore[method-assign]
        try:
            play(driver, case)
        except AssertionError as error:
            if "foreign KV" not in str(error) and "pooled block" not in str(error):
                raise
            return
    pytest.fail("sixty seeds did not notice")

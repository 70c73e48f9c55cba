"""Several groups of layers: random loads over vLLM's schedulers and a runner of tags.

The memory reads and writes pages of groups without a pool as early and as late as the plan allows,
so a step that lacks one of its flags reads foreign KV.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from pie_vllm.plan import NO_RUNS, StepPlan, runs
from pie_vllm.policy.control.elastic_pool import FREE_MARGIN
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.policy.pool.ended_requests import EndedRequests
from pie_vllm.vllm.scheduler_side import scheduler
from pie_vllm.vllm.scheduler_side.scheduler import PieSchedulerMixin
from tests.helpers.fuzz import (
    BLOCK_SIZE,
    Case,
    make_driver,
    play,
    random_groups,
    random_groups_preempted,
    random_groups_returning,
)
from tests.helpers.scheduling import geometry, make, make_request

pytestmark = pytest.mark.vllm


def run(seed: int, draw: Callable[..., Case] = random_groups, **options: Any) -> Counter[str]:
    """Play one random case; returns how often what happened."""
    case = draw(seed, **options)
    driver = make_driver(case.geometry, case.memory(), case.decider(), case.pool(), **case.options)
    plans: list[StepPlan] = []
    end_step = driver.scheduler.pie_controller.end_step

    def noted(*args: object) -> object:
        orders = end_step(*args)
        if orders.plan is not None:
            plans.append(orders.plan)
        return orders

    driver.scheduler.pie_controller.end_step = noted
    play(driver, case)
    manager = driver.scheduler.kv_cache_manager
    residency = manager.residency
    return Counter(
        steps=driver.steps,
        demotions=residency.demotions,
        promotions=residency.promotions,
        preemptions=len(driver.preemptions),
        stores_first=sum(plan.stores_first for plan in plans),
        stores_later=sum(len(plan.stores) > 0 and not plan.stores_first for plan in plans),
        after_all=sum(plan.after_all for plan in plans),
        stores_after_all=sum(plan.stores_after_all for plan in plans),
        promotions_first=sum(plan.promotions_first for plan in plans),
        parked=residency.parking.parked_blocks,
        restored=residency.parking.restored_blocks,
        again=manager.hit_counts.recomputed_tokens,
    )


@pytest.mark.fuzz
def test_every_page_read_is_right(fuzz_seeds: range) -> None:
    """Pooled and resident groups alike, whatever is demoted, promoted and taken again."""
    total: Counter[str] = Counter()
    for seed in fuzz_seeds:
        total += run(seed)
    assert total["demotions"] > 5 * len(fuzz_seeds)
    for what in ("promotions", "preemptions", "stores_first", "stores_later", "after_all"):
        assert total[what] > len(fuzz_seeds) // 4, what


@pytest.mark.fuzz
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_preempted_requests_kept_is_right(fuzz_seeds: range, asynchronous: bool) -> None:
    """Windows, states and full blocks come back, whatever is aborted and forgotten meanwhile."""
    total: Counter[str] = Counter()
    for seed in fuzz_seeds:
        total += run(seed, random_groups_preempted, asynchronous=asynchronous)
    for what in ("preemptions", "parked", "restored", "stores_after_all", "promotions_first"):
        assert total[what] > len(fuzz_seeds) // 2, what


@pytest.mark.fuzz
def test_what_ended_requests_kept_is_right(
    monkeypatch: pytest.MonkeyPatch, fuzz_seeds: range
) -> None:
    """The next turn of a chat goes on with windows, states and full blocks out of the pool."""
    taken: Counter[str] = Counter()
    take_over = EndedRequests.take_over

    def counted(self: EndedRequests, key: Any, request_id: str) -> None:
        taken["over"] += 1
        take_over(self, key, request_id)

    monkeypatch.setattr(EndedRequests, "take_over", counted)
    for seed in fuzz_seeds:
        run(seed, random_groups_returning)
    assert taken["over"] > len(fuzz_seeds)


def test_other_last_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: whoever has the full blocks of an ended request takes its last one, too."""
    longest = EndedRequests.longest

    def blind(self: EndedRequests, keys: Any, tokens: Any, more_than: int) -> Any:
        for key, ended in self._ended.items():
            if key in keys and len(keys) > ended.tail.index:
                self._ended[key] = ended._replace(
                    last=tuple(tokens(ended.tail.tokens - len(ended.last), ended.tail.tokens) or ())
                )
        return longest(self, keys, tokens, more_than)

    monkeypatch.setattr(EndedRequests, "longest", blind)
    for seed in range(100):
        try:
            run(seed, random_groups_returning)
        except AssertionError as error:
            if "foreign KV" not in str(error) and "answer" not in str(error):
                raise
            return
    pytest.fail("100 seeds did not notice")


FLAGS = [
    ("stores_first", random_groups),
    ("after_all", random_groups),
    ("stores_after_all", random_groups_preempted),
    ("promotions_first", random_groups_preempted),
]


@pytest.mark.parametrize(("flag", "draw"), FLAGS)
def test_a_plan_without_its_flag_is_noticed(
    monkeypatch: pytest.MonkeyPatch, flag: str, draw: Callable[..., Case]
) -> None:
    """Negative control: pages of groups without a pool are written to beside the copies."""
    end_step = Residency.end_step

    def forgetful(self: Residency, *args: Any, **kwargs: Any) -> StepPlan | None:
        plan = end_step(self, *args, **kwargs)
        return None if plan is None else plan._replace(**{flag: False})

    monkeypatch.setattr(Residency, "end_step", forgetful)
    for seed in range(32):
        try:
            run(seed, draw)
        except AssertionError as error:
            if "foreign KV" not in str(error):
                raise
            return
    pytest.fail("32 seeds did not notice")


def test_blocks_that_a_step_fills_are_not_zeroed() -> None:
    """A new block may be given back in its own step, and get KV of the pool in it."""
    plan = StepPlan(1, NO_RUNS, runs([(4, 0, 3), (9, 7, 1)]), NO_RUNS, (), True)
    output = SimpleNamespace(pie=SimpleNamespace(plan=plan), new_block_ids_to_zero=[3, 5, 9, 10])
    PieSchedulerMixin._keep_filled(object(), output)
    assert output.new_block_ids_to_zero == [3, 10]
    output.new_block_ids_to_zero = [4]
    PieSchedulerMixin._keep_filled(object(), output)
    assert output.new_block_ids_to_zero is None


def test_the_longest_request_fits_when_cpu_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its windows and states take residents, so more of its other blocks need rows."""
    monkeypatch.setattr(scheduler, "available_host_bytes", lambda: FREE_MARGIN // 2)
    monkeypatch.setattr(scheduler, "monotonic", count(step=2).__next__)
    sizes, longest = geometry(20, 30), 32 * BLOCK_SIZE
    driver = make_driver(sizes, beside=(20, 0, 40), max_model_len=longest)
    driver.add(make_request("r", [7] * (longest - 6), 5, BLOCK_SIZE))
    driver.run()
    driver.verify()
    assert len(driver.answers["r"]) == 5


@pytest.mark.parametrize(("beside", "zeroed"), [((), False), ((20,), False), ((20, 0), True)])
def test_new_blocks_are_noted_where_they_are_zeroed(beside: tuple[int, ...], zeroed: bool) -> None:
    """Those of groups without a pool always, those of the pooled group beside states."""
    manager = make(
        geometry(40, 20), beside=beside, max_model_len=320, enable_prefix_caching=False
    ).kv_cache_manager
    noted = [
        m.block_pool is not manager.block_pool for m in manager.coordinator.single_type_managers
    ]
    assert noted == [*(True for _ in beside), zeroed]

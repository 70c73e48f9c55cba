"""Parked KV over vLLM's real schedulers: hits instead of computing again, and right pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from pie_vllm.policy.admission import keeping
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.policy.pool.parked_kv import Parking
from tests.helpers import scheduling
from tests.helpers.broken_memory import RestoresWrongRows, SkipsPromotions, SkipsStores
from tests.helpers.fuzz import BLOCK_SIZE
from tests.helpers.parked_chats import (
    POOLED,
    RESIDENT,
    ROWS,
    cached_tokens,
    chat_then_others,
    computed_again,
    crowd,
    driver,
    parking,
    prompt,
    run_crowd,
)
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import DictMemory

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preempted_requests_compute_nothing_again(asynchronous: bool) -> None:
    """Their full blocks and their last one, which is not full, come back from the pool."""
    made = driver(async_scheduling=asynchronous)
    run_crowd(made)
    assert len(made.preemptions) >= 5
    assert computed_again(made) == 0
    assert made.scheduler.kv_cache_manager.hit_counts.hits.parked > 0
    assert parking(made).restored_blocks > made.scheduler.kv_cache_manager.hit_counts.hits.parked


@pytest.mark.parametrize(("policy", "rows"), [("off", ROWS), ("lru", POOLED)])
def test_without_rows_they_compute_again(policy: str, rows: int) -> None:
    """The test above can fail: parking off, or a pool that has no rows to spare."""
    made = driver(parking=policy, rows=rows)
    run_crowd(made)
    assert made.preemptions
    assert computed_again(made) > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_evicted_prefix_is_hit(asynchronous: bool) -> None:
    """The next turn of a chat finds all full blocks of the turn before."""
    made = driver(async_scheduling=asynchronous)
    history = chat_then_others(made)
    made.add(make_request("next", [*history, 1, 2, 3], 5, BLOCK_SIZE))
    made.step()
    assert cached_tokens(made, "next") == (len(history) - 1) // BLOCK_SIZE * BLOCK_SIZE
    made.run()
    made.verify()


@pytest.mark.parametrize(
    ("own", "foreign"),
    [
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({"cache_salt": "a"}, {}),
        ({"lora_request": LoRARequest("a", 1, "/a")}, {"lora_request": LoRARequest("b", 2, "/b")}),
        ({"lora_request": LoRARequest("a", 1, "/a")}, {}),
    ],
)
def test_parked_kv_is_hit_by_its_own_salt_and_adapter_only(
    own: dict[str, Any], foreign: dict[str, Any]
) -> None:
    """The same tokens of another tenant, or through another LoRA adapter, are computed anew."""
    made = driver()
    history = chat_then_others(made, **own)
    for name, other, known in (("foreign", foreign, 0), ("own", own, 160)):
        made.add(make_request(name, [*history, 1, 2, 3], 5, BLOCK_SIZE, **other))
        made.step()
        assert cached_tokens(made, name) == known
        made.run()
    made.verify()


def test_a_prefix_larger_than_the_free_residents_takes_pooled_ids() -> None:
    """Where running requests hold most residents, the rest of a hit is pooled at once."""
    made = driver()
    history = chat_then_others(made)
    residency = made.scheduler.kv_cache_manager.residency
    made.add(make_request("running", prompt(7, 130), 40, BLOCK_SIZE))
    made.run_until(lambda: len(made.answers["running"]) >= 5)
    promotions = residency.promotions
    made.add(make_request("next", [*history, 1, 2, 3], 30, BLOCK_SIZE))
    made.step()
    assert cached_tokens(made, "next") == 160
    ids = [block.block_id for block in residency.tables["next"]]
    assert 0 < sum(i >= RESIDENT for i in ids) <= POOLED
    assert residency.promotions == promotions
    made.run()
    made.verify()


def test_a_request_that_must_wait_for_its_parked_blocks_waits() -> None:
    """It is not admitted with half of them while others run, and computes nothing again then."""
    made = driver()
    history = chat_then_others(made)
    made.add(make_request("running", prompt(7, 250), 40, BLOCK_SIZE))
    made.run_until(lambda: len(made.answers["running"]) >= 5)
    made.add(make_request("next", [*history, 1, 2, 3], 30, BLOCK_SIZE))
    while "running" in made.scheduler.requests:
        made.step()
        assert "next" not in made.output.num_scheduled_tokens
    made.step()
    assert cached_tokens(made, "next") == 160
    made.run()
    made.verify()


def test_a_reset_forgets_what_is_parked() -> None:
    """After new weights no hash may match; requests that run are computed anew."""
    made = driver()
    history = chat_then_others(made)
    assert len(parking(made))
    made.add(make_request("running", prompt(7, 100), 40, BLOCK_SIZE))
    made.run_until(lambda: len(made.answers["running"]) >= 5)
    made.reset()
    assert not len(parking(made))
    assert not parking(made).tails
    made.add(make_request("next", [*history, 1, 2, 3], 5, BLOCK_SIZE))
    made.step()
    resumed = made.output.scheduled_cached_reqs
    assert resumed.num_computed_tokens == [0]
    made.run_until(lambda: "next" in made.output.num_scheduled_tokens)
    assert cached_tokens(made, "next") == 0
    made.run()
    made.verify()
    assert made.scheduler.kv_cache_manager.residency.rows.num_parked == len(parking(made))


def preempted_while_its_blocks_are_filled() -> Driver:
    """One step gives a request blocks and then takes them for another one, of higher priority."""
    made = driver(
        policy="priority",
        long_prefill_token_threshold=48,
        scheduler_reserve_full_isl=False,
        max_num_batched_tokens=128,
    )
    made.add(make_request("low", prompt(9, 270), 5, BLOCK_SIZE, priority=5))
    made.step()
    made.add(make_request("high", prompt(0, 100), 40, BLOCK_SIZE))
    made.run()
    return made


def test_blocks_that_were_never_filled_are_not_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM caches a block before the step that fills it, in which its request may be preempted."""
    forgotten = 0
    forget = keeping.forget_unfilled

    def counted(residency: Residency, request_id: str, computed: int, size: int) -> None:
        nonlocal forgotten
        table = residency.tables.get(request_id, ())
        before = sum(block.block_hash is not None for block in table)
        forget(residency, request_id, computed, size)
        forgotten += before - sum(block.block_hash is not None for block in table)

    monkeypatch.setattr(keeping, "forget_unfilled", counted)
    made = preempted_while_its_blocks_are_filled()
    made.verify()
    assert forgotten


def test_a_block_that_was_never_filled_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: left in the prefix cache, it is hit."""
    monkeypatch.setattr(keeping, "forget_unfilled", lambda *_: None)
    with pytest.raises(AssertionError, match="foreign KV"):
        preempted_while_its_blocks_are_filled()


def test_rows_of_aborted_requests_are_free() -> None:
    """A preempted request that is aborted takes its tail with it."""
    made = driver()
    crowd(made)
    made.run_until(lambda: bool(parking(made).tails))
    (request_id,) = list(parking(made).tails._tails)[:1]
    made.abort(request_id)
    assert request_id not in parking(made).tails._tails
    made.run()
    assert not parking(made).tails
    residency = made.scheduler.kv_cache_manager.residency
    assert residency.rows.num_parked == len(parking(made))


class _TearsStores(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        before = self.rows.copy()
        super().run(plan, work)
        for _, row, count in plan.stores if plan else ():
            self.rows[row : row + count, BLOCK_SIZE // 2 :] = before[
                row : row + count, BLOCK_SIZE // 2 :
            ]


@pytest.mark.parametrize("memory", [SkipsStores, SkipsPromotions, RestoresWrongRows, _TearsStores])
def test_wrong_copies_are_noticed(memory: Callable[..., DictMemory]) -> None:
    """Negative control: a row that is stale, foreign or torn, a page that is not filled."""
    sizes = scheduling.geometry(RESIDENT, POOLED, ROWS, chunk_rows=ROWS)
    made = driver(memory(sizes, BLOCK_SIZE))
    crowd(made)
    with pytest.raises(AssertionError, match="foreign KV"):
        made.run()


def test_a_hash_that_outlives_a_reset_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the reset: what older weights made would be hit."""
    made = driver()
    history = chat_then_others(made)
    monkeypatch.setattr(Parking, "clear", lambda _: None)
    made.reset()
    made.add(make_request("next", [*history, 1, 2, 3], 5, BLOCK_SIZE))
    with pytest.raises(AssertionError, match="foreign KV"):
        made.step()
    assert cached_tokens(made, "next") > 0

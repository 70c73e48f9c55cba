"""Parked KV over vLLM's real schedulers: hits instead of computing again, and right pages."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from vllm.lora.request import LoRARequest

from pie_vllm.policy.parking import Parking
from pie_vllm.policy.plan import Copy
from pie_vllm.vllm.manager import PieBlockSpaceManager
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import DictMemory, Memory

pytestmark = pytest.mark.vllm

RESIDENT, POOLED, ROWS = 20, 4, 200
WINDOW = Fixed(POOLED, POOLED)


def driver(
    memory: Memory | None = None, rows: int = ROWS, decider: Fixed = WINDOW, **options: Any
) -> Driver:
    """A few residents, hardly any pooled ids, and rows for much more."""
    sizes = scheduling.geometry(RESIDENT, POOLED, rows)
    options = {"max_model_len": 320, "max_num_batched_tokens": 64, **options}
    return make_driver(sizes, memory, decider, **options)


def prompt(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(997) for _ in range(count)]


def crowd(made: Driver, count: int = 12) -> None:
    """More requests than there are blocks for, all at once."""
    for i in range(count):
        made.add(make_request(f"r{i}", prompt(i, 30 + 7 * (i % 4)), 60, BLOCK_SIZE))


def computed_again(made: Driver) -> int:
    return int(made.scheduler.kv_cache_manager.admissions.recomputed_tokens)


def parking(made: Driver) -> Parking:
    found: Parking = made.scheduler.kv_cache_manager.residency.parking
    return found


def cached_tokens(made: Driver, request_id: str) -> int:
    """Tokens that a request found computed when it was admitted in the last step."""
    new = {r.req_id: r.num_computed_tokens for r in made.output.scheduled_new_reqs}
    return int(new[request_id])


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_preempted_requests_compute_nothing_again(policy: str, asynchronous: bool) -> None:
    """Their full blocks and their last one, which is not full, come back from the pool."""
    made = driver(parking=policy, async_scheduling=asynchronous)
    crowd(made)
    made.run()
    made.verify()
    assert len(made.preemptions) >= 5
    assert computed_again(made) == 0
    assert made.scheduler.kv_cache_manager.admissions.hits.parked > 0
    assert parking(made).restored_blocks > made.scheduler.kv_cache_manager.admissions.hits.parked


@pytest.mark.parametrize(("policy", "rows"), [("off", ROWS), ("lru", POOLED)])
def test_without_rows_they_compute_again(policy: str, rows: int) -> None:
    """The test above can fail: parking off, or a pool that has no rows to spare."""
    made = driver(parking=policy, rows=rows)
    crowd(made)
    made.run()
    made.verify()
    assert made.preemptions
    assert computed_again(made) > 0


def chat_then_others(made: Driver, **other: Any) -> list[int]:
    """A chat of ten blocks, idle, whose residents others have used since; returns its tokens."""
    made.add(make_request("chat", prompt(100, 150), 12, BLOCK_SIZE, **other))
    made.run()
    crowd(made)
    made.run()
    return [*made.prompts["chat"], *made.answers["chat"]]


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


class AheadOf(NamedTuple):
    """What a chat that comes back met.

    Attributes:
        steps: until it was admitted.
        copied: pages that each of them filled.
    """

    steps: int
    copied: list[int]


def comes_back(made: Driver, history: list[int]) -> AheadOf:
    """The next turn of a chat, while another request runs."""
    made.add(make_request("running", prompt(7, 60), 60, BLOCK_SIZE))
    made.run_until(lambda: len(made.answers["running"]) >= 5)
    made.add(make_request("next", [*history, 1, 2, 3], 30, BLOCK_SIZE))
    copied: list[int] = []
    while "next" not in made.output.num_scheduled_tokens:
        made.step()
        plan = made.output.pie_plan
        copied.append(sum(c.count for c in plan.promotions) if plan else 0)
        assert "running" in made.output.num_scheduled_tokens
        assert len(copied) < 50
    return AheadOf(len(copied), copied)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_long_prefix_comes_back_ahead_of_its_request(asynchronous: bool) -> None:
    """In as many blocks a step as the link hides, so that those running do not wait for it."""
    decider = Fixed(POOLED, POOLED, at_once=4)
    made = driver(decider=decider, async_scheduling=asynchronous)
    history = chat_then_others(made)
    manager = made.scheduler.kv_cache_manager
    hits, restored = manager.admissions.hits, parking(made).restored_blocks
    found = comes_back(made, history)
    assert found.steps == 3
    assert found.copied == [4, 4, 2]
    assert cached_tokens(made, "next") == 160
    now = manager.admissions.hits
    assert (now.resident - hits.resident, now.parked - hits.parked) == (0, 10)
    assert parking(made).restored_blocks == restored + 10
    made.run()
    made.verify()


def test_where_the_link_hides_it_all_it_comes_in_one_step() -> None:
    """As before: the request is admitted at once."""
    made = driver(decider=Fixed(POOLED, POOLED, at_once=10))
    assert comes_back(made, chat_then_others(made)) == (1, [10])


def test_with_nobody_running_a_prefix_comes_in_one_step() -> None:
    """There is nobody to keep waiting."""
    made = driver(decider=Fixed(POOLED, POOLED, at_once=1))
    history = chat_then_others(made)
    made.add(make_request("next", [*history, 1, 2, 3], 30, BLOCK_SIZE))
    made.step()
    assert cached_tokens(made, "next") == 160


def stores_in_decodes(made: Driver) -> list[int]:
    """Blocks stored in each step that computes no prompt, while requests take idle blocks."""
    stored: list[int] = []
    made.add(make_request("idle", prompt(100, 250), 4, BLOCK_SIZE))
    made.run()
    made.add(make_request("a", prompt(1, 20), 90, BLOCK_SIZE))
    made.run_until(lambda: len(made.answers["a"]) >= 20)
    made.add(make_request("b", prompt(2, 20), 70, BLOCK_SIZE))
    while made.scheduler.requests:
        made.step()
        plan, output = made.output.pie_plan, made.output
        if output.total_num_scheduled_tokens == len(output.num_scheduled_tokens):
            stored.append(sum(c.count for c in plan.stores) if plan else 0)
    made.verify()
    return stored


def test_blocks_are_stored_in_steps_of_prompts_ahead_of_their_eviction() -> None:
    """Steps that only decode then find pages whose KV is in the pool, and copy nothing."""
    made = driver(decider=Fixed(POOLED, POOLED, ahead=100))
    assert sum(stores_in_decodes(made)) == 0
    assert parking(made).ahead_blocks >= 8
    assert parking(made).lost_blocks == 0


def test_without_that_steps_that_decode_store() -> None:
    """The test above can fail."""
    made = driver(decider=Fixed(POOLED, POOLED))
    assert sum(stores_in_decodes(made)) >= 8
    assert parking(made).ahead_blocks == 0


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
        max_num_batched_tokens=256,
    )
    made.add(make_request("low", prompt(9, 270), 5, BLOCK_SIZE, priority=5))
    made.step()
    made.add(make_request("high", prompt(0, 100), 40, BLOCK_SIZE))
    made.run()
    return made


def test_blocks_that_were_never_filled_are_not_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM caches a block before the step that fills it, in which its request may be preempted."""
    forgotten = 0
    forget = PieBlockSpaceManager._forget_unfilled

    def counted(self: PieBlockSpaceManager, request: Any, table: Any) -> None:
        nonlocal forgotten
        before = sum(block.block_hash is not None for block in table)
        forget(self, request, table)
        forgotten += before - sum(block.block_hash is not None for block in table)

    monkeypatch.setattr(PieBlockSpaceManager, "_forget_unfilled", counted)
    made = preempted_while_its_blocks_are_filled()
    made.verify()
    assert forgotten


def test_a_block_that_was_never_filled_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: left in the prefix cache, it is hit."""
    monkeypatch.setattr(PieBlockSpaceManager, "_forget_unfilled", lambda *_: None)
    with pytest.raises(AssertionError, match="foreign KV"):
        preempted_while_its_blocks_are_filled()


def test_rows_of_aborted_requests_are_free() -> None:
    """A preempted request that is aborted takes its tail with it."""
    made = driver()
    crowd(made)
    made.run_until(lambda: bool(parking(made).tails))
    (request_id,) = list(parking(made).tails)[:1]
    made.abort(request_id)
    assert request_id not in parking(made).tails
    made.run()
    assert not parking(made).tails
    residency = made.scheduler.kv_cache_manager.residency
    assert residency.rows.num_parked == len(parking(made))


class _SkipsStores(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        super().run(plan and plan._replace(stores=()), work)


class _SkipsRestores(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        super().run(plan and plan._replace(promotions=()), work)


class _RestoresWrongRows(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        super().run(plan and plan._replace(promotions=self._wrong(plan)), work)

    def _wrong(self, plan: Any) -> tuple[Copy, ...]:
        stored = {row + i for _, row, count in plan.stores for i in range(count)}
        held = [r for r in range(self.chunks * self.chunk_rows) if r not in stored]
        return tuple(
            Copy(block + i, held[(held.index(row + i) + 1) % len(held)], 1)
            for block, row, count in plan.promotions
            for i in range(count)
        )


class _TearsStores(DictMemory):
    def run(self, plan: Any, work: Any) -> None:
        before = self.rows.copy()
        super().run(plan, work)
        for _, row, count in plan.stores if plan else ():
            self.rows[row : row + count, BLOCK_SIZE // 2 :] = before[
                row : row + count, BLOCK_SIZE // 2 :
            ]


@pytest.mark.parametrize("memory", [_SkipsStores, _SkipsRestores, _RestoresWrongRows, _TearsStores])
def test_wrong_copies_are_noticed(memory: Callable[..., DictMemory]) -> None:
    """Negative control: a row that is stale, foreign or torn, a page that is not filled."""
    made = driver(memory(scheduling.geometry(RESIDENT, POOLED, ROWS), BLOCK_SIZE))
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

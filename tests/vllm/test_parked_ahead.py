"""KV that is stored before its block is wanted, and comes back before its request is admitted."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from pie_vllm.plan import num_copied
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE
from tests.helpers.parked_chats import (
    POOLED,
    cached_tokens,
    chat_then_others,
    driver,
    parking,
    prompt,
)
from tests.helpers.scheduling import Driver, make_request

pytestmark = pytest.mark.vllm


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
    made.add(make_request("running", prompt(77, 60), 60, BLOCK_SIZE))
    made.run_until(lambda: len(made.answers["running"]) >= 5)
    made.add(make_request("next", [*history, 1, 2, 3], 30, BLOCK_SIZE))
    copied: list[int] = []
    while "next" not in made.output.num_scheduled_tokens:
        made.step()
        plan = made.output.pie.plan
        copied.append(num_copied(plan.promotions) if plan else 0)
        assert "running" in made.output.num_scheduled_tokens
        assert len(copied) < 50
    return AheadOf(len(copied), copied)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_long_prefix_comes_back_ahead_of_its_request(asynchronous: bool) -> None:
    """In as many blocks a step as the link hides, so that those running do not wait for it."""
    decider = Fixed(POOLED, POOLED, restore_blocks_max=4)
    made = driver(decider=decider, async_scheduling=asynchronous)
    history = chat_then_others(made)
    manager = made.scheduler.kv_cache_manager
    hits, restored = manager.hit_counts.hits, parking(made).restored_blocks
    found = comes_back(made, history)
    assert found.steps == 3
    assert found.copied == [4, 4, 2]
    assert cached_tokens(made, "next") == 160
    now = manager.hit_counts.hits
    assert (now.resident - hits.resident, now.parked - hits.parked) == (0, 10)
    assert parking(made).restored_blocks == restored + 10
    made.run()
    made.verify()


def test_where_the_link_hides_it_all_it_comes_in_one_step() -> None:
    """As before: the request is admitted at once."""
    made = driver(decider=Fixed(POOLED, POOLED, restore_blocks_max=10))
    assert comes_back(made, chat_then_others(made)) == (1, [10])


def test_with_nobody_running_a_prefix_comes_in_one_step() -> None:
    """There is nobody to keep waiting."""
    made = driver(decider=Fixed(POOLED, POOLED, restore_blocks_max=1))
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
        plan, output = made.output.pie.plan, made.output
        if output.total_num_scheduled_tokens == len(output.num_scheduled_tokens):
            stored.append(num_copied(plan.stores) if plan else 0)
    made.verify()
    return stored


def test_blocks_are_stored_in_steps_of_prompts_ahead_of_their_eviction() -> None:
    """Steps that only decode then find pages whose KV is in the pool, and copy nothing."""
    made = driver(decider=Fixed(POOLED, POOLED, store_ahead_max=100))
    assert sum(stores_in_decodes(made)) == 0
    assert parking(made).ahead_blocks >= 8
    assert parking(made).lost_blocks == 0


def test_without_that_steps_that_decode_store() -> None:
    """The test above can fail."""
    made = driver(decider=Fixed(POOLED, POOLED))
    assert sum(stores_in_decodes(made)) >= 8
    assert parking(made).ahead_blocks == 0

"""Parking without a prefix cache, over vLLM's real schedulers: each request finds its own KV."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.request import StreamingUpdate

from pie_vllm.policy.admission import keeping
from pie_vllm.policy.admission.request_keys import RequestKeys
from tests.helpers import scheduling
from tests.helpers.broken_memory import RestoresWrongRows, SkipsPromotions
from tests.helpers.fuzz import BLOCK_SIZE, make_driver, play, random_preemptions
from tests.helpers.parked_chats import (
    POOLED,
    RESIDENT,
    ROWS,
    computed_again,
    crowd,
    driver,
    parking,
    prompt,
    run_crowd,
)
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import DictMemory, Memory

pytestmark = pytest.mark.vllm


def uncached(memory: Memory | None = None, **options: Any) -> Driver:
    """A few residents, hardly any pooled ids, many rows, and no prefix cache."""
    return driver(memory, **{"enable_prefix_caching": False, **options})


def waiting_with_kv(made: Driver) -> str:
    """Step until a preempted request waits with blocks and a tail kept; returns its name."""
    made.run_until(lambda: bool(parking(made).tails) and len(parking(made)) > 0)
    (name,) = [*parking(made).tails._tails][:1]
    return name


def kept(made: Driver, name: str) -> tuple[int, int]:
    """How many blocks of a request are found cached, and how many parked."""
    manager = made.scheduler.kv_cache_manager
    keys = [*manager.admission.request_keys(name, 0, 100)]
    parked = sum(map(parking(made).parked, keys))
    return sum(block is not None for block in manager.block_pool.cached(keys)), parked


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preempted_requests_compute_nothing_again(asynchronous: bool) -> None:
    """Their full blocks and their last one come back, from residents, pooled ids and rows."""
    made = uncached(async_scheduling=asynchronous)
    run_crowd(made)
    assert len(made.preemptions) >= 5
    assert computed_again(made) == 0
    hits = made.scheduler.kv_cache_manager.hit_counts.hits
    assert min(hits.resident, hits.pooled, hits.parked) > 0
    assert parking(made).restored_blocks > hits.parked


@pytest.mark.parametrize(
    "options", [{"parking": "off"}, {"rows": POOLED}, {"enable_chunked_prefill": False}]
)
def test_without_rows_they_compute_again(options: dict[str, Any]) -> None:
    """With parking off, no rows to spare, or a model that may be unable to go on behind KV."""
    made = uncached(**{"max_num_batched_tokens": 320, **options})
    run_crowd(made)
    assert made.preemptions
    assert computed_again(made) > 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "KV of preempted requests"),
        ({"enable_prefix_caching": True}, "KV of prefixes and preemptions"),
        ({"parking": "off"}, "nothing"),
        ({"beside": (20,)}, "KV of preempted requests"),
        ({"beside": (20,), "enable_prefix_caching": True}, "KV of whole chats and preemptions"),
        ({"beside": (20,), "parking": "off"}, "nothing"),
    ],
)
def test_the_log_says_what_is_parked(
    options: dict[str, Any],
    what: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At start, by what the manager does."""
    for name in ("vllm", "vllm.pie"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with caplog.at_level(logging.INFO, logger="vllm.pie"):
        uncached(**options)
    assert f"what is parked in CPU memory is {what}" in caplog.text


def test_nobody_else_finds_it() -> None:
    """The same prompt computes all of it, while its blocks are parked for another request."""
    made = uncached()
    crowd(made)
    name = waiting_with_kv(made)
    tokens = [*made.prompts[name], *made.answers[name]]
    made.add(make_request("same", tokens, 5, BLOCK_SIZE))
    made.run_until(lambda: "same" in made.output.num_scheduled_tokens)
    (new,) = [r for r in made.output.scheduled_new_reqs if r.req_id == "same"]
    assert new.num_computed_tokens == 0
    made.run()
    made.verify()


def test_one_that_wants_logprobs_of_its_prompt_computes_all_of_it() -> None:
    """As vLLM has it with a prefix cache: logprobs come from the forward pass alone."""
    made = uncached()
    crowd(made)
    for request in made.scheduler.requests.values():
        request.skip_reading_prefix_cache = True
    made.run()
    made.verify()
    assert made.preemptions
    assert parking(made).parked_blocks == 0
    assert computed_again(made) > 0


@pytest.mark.parametrize("ended", ["aborted", "finished"])
def test_what_a_request_leaves_is_free_at_once(ended: str) -> None:
    """Rows, entries and ids: nobody else can use them."""
    made = uncached()
    crowd(made)
    name = waiting_with_kv(made)
    manager, rows = made.scheduler.kv_cache_manager, parking(made).rows
    cached, parked = kept(made, name)
    assert cached + parked > 0
    if ended == "aborted":
        before = len(rows())
        made.abort(name)
        assert len(rows()) == before - parked - 1
    else:
        made.run_until(lambda: name not in made.scheduler.requests)
    assert kept(made, name) == (0, 0)
    made.run()
    assert not len(manager.block_pool.cached_block_hash_to_block)
    assert not rows()
    assert manager.residency.rows.num_free == ROWS


def test_a_reset_forgets_it() -> None:
    """After new weights preempted requests compute all of their tokens."""
    made = uncached()
    crowd(made)
    name = waiting_with_kv(made)
    made.reset()
    assert kept(made, name) == (0, 0)
    assert not parking(made).any
    made.step()
    assert set(made.output.scheduled_cached_reqs.num_computed_tokens) == {0}
    made.run()
    made.verify()


def test_a_session_that_goes_on_with_other_tokens_forgets_it() -> None:
    """vLLM drops the answer of a session that is preempted when its next piece comes."""
    made = uncached()
    crowd(made)
    name = waiting_with_kv(made)
    piece = make_request(name, prompt(50, 40), 5, BLOCK_SIZE, resumable=True)
    update = StreamingUpdate.from_request(piece)
    made.scheduler._update_request_as_session(made.scheduler.requests[name], update)
    assert kept(made, name) == (0, 0)
    assert parking(made).tails.find(name) is None


def test_what_is_parked_gives_way_from_its_end() -> None:
    """With few rows, a preempted request has its first blocks again and computes the others."""
    made = uncached(rows=POOLED + 12)
    crowd(made)
    partly = 0

    def looked(request: Any, cap: int | None = None) -> Any:
        nonlocal partly
        found = original(request) if cap is None else original(request, cap)
        computed = made.scheduler.kv_cache_manager.hit_counts._computed.get(request.request_id, 0)
        partly += 0 < found[1] < computed
        return found

    manager = made.scheduler.kv_cache_manager
    original = manager.get_computed_blocks
    manager.get_computed_blocks = looked
    made.run()
    made.verify()
    assert partly
    assert parking(made).lost_blocks + computed_again(made) > 0


# Random loads, and controls.


def run(seed: int, **options: Any) -> Counter[str]:
    """Play one random case; returns how often what happened."""
    case = random_preemptions(seed)
    made = make_driver(
        case.geometry, case.memory(), case.decider(), case.pool(), **{**case.options, **options}
    )
    play(made, case)
    manager = made.scheduler.kv_cache_manager
    return Counter(
        preemptions=len(made.preemptions),
        parked=parking(made).parked_blocks,
        restored=parking(made).restored_blocks,
        again=computed_again(made),
        resident_hits=manager.hit_counts.hits.resident,
        pooled_hits=manager.hit_counts.hits.pooled,
        parked_hits=manager.hit_counts.hits.parked,
    )


@pytest.mark.fuzz
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_page_read_is_right(fuzz_seeds: range, asynchronous: bool) -> None:
    """Whatever is preempted, aborted, forgotten and given up meanwhile."""
    total: Counter[str] = Counter()
    for seed in fuzz_seeds:
        total += run(seed, async_scheduling=asynchronous)
    for what in ("preemptions", "parked", "restored", "resident_hits", "parked_hits"):
        assert total[what] > len(fuzz_seeds), what
    assert total["pooled_hits"] > 0


@pytest.mark.parametrize("memory", [SkipsPromotions, RestoresWrongRows])
def test_wrong_copies_are_noticed(memory: Callable[..., DictMemory]) -> None:
    """Negative control: the row of another block, or a page that is not filled."""
    sizes = scheduling.geometry(RESIDENT, POOLED, ROWS, chunk_rows=ROWS)
    made = uncached(memory(sizes, BLOCK_SIZE))
    crowd(made)
    with pytest.raises(AssertionError, match="foreign KV"):
        made.run()


def test_a_tail_that_is_not_kept_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: no page is wrong, and tokens are computed twice."""
    monkeypatch.setattr(keeping, "keep_tail", lambda *_: None)
    made = uncached()
    run_crowd(made)
    assert computed_again(made) > 0


def test_kv_that_is_not_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a request's rows outlive it."""
    monkeypatch.setattr(RequestKeys, "forget", lambda *_: None)
    made = uncached()
    crowd(made)
    made.run()
    assert parking(made).rows()

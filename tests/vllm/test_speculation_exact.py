"""With n-gram speculation pie's greedy tokens are stock's, and so are its drafts.

On the same schedule they are bit for bit those of stock with the same speculation. Where schedules
differ, float32 tokens are those of stock without any: verification changes no greedy token.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.engine import EngineError, Engines, Setup, request, round_
from tests.helpers.engine_load import (
    chats,
    check_diverse,
    check_mostly_pooled,
    check_traffic,
    facts,
    ngram,
    tokens,
    user,
)
from tests.helpers.engine_model import LAYERS
from tests.vllm.test_other_schedules import ANSWER, GRAMMAR, Record, memory_for_all

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def repeating(count: int) -> list[str]:
    """Chats that are asked for what they say, so that drafts out of it are accepted."""
    texts = [facts(i, 3 + i % 3) for i in range(count)]
    return [user(f"Repeat this word by word: {text}") for text in texts]


def check(engines: Engines, setup: Setup, accepted: int) -> Record:
    """Tokens, logprobs and drafts of 32 chats are stock's, most blocks pooled; pie's record."""
    requests = [request(text, max_tokens=28, logprobs=5) for text in repeating(32)]
    (pie,), (stock,) = engines.both(setup, [round_(requests)])
    assert pie["schedule"] == stock["schedule"]
    assert pie["drafts"] == stock["drafts"]
    assert pie["answers"] == stock["answers"]
    assert pie["most_running"] >= 32
    assert pie["accepted"] == stock["accepted"] > accepted
    assert pie["drafted"] > pie["accepted"], "a rejected token, too, must have been there"
    check_mostly_pooled(pie)
    check_traffic(pie, setup.page * setup.layers)
    return pie


def test_tokens_and_drafts_are_stocks(engines: Engines, few: Path) -> None:
    """A few layers of the real model; the metrics that the dashboard divides by are there."""
    other = {**ngram(3), "max_num_batched_tokens": 192, "disable_log_stats": False}
    metrics = check(engines, Setup(few, len(LAYERS), 42, 150, other=other), 20)["metrics"]
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 20
    assert metrics["vllm:spec_decode_num_drafts"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("drafts", [1, 3, 5])
def test_all_layers(engines: Engines, model: Path, drafts: int) -> None:
    """The whole real model."""
    other = {**ngram(drafts), "max_num_batched_tokens": 192}
    check(engines, Setup(model, 30, 42, 150, other=other), 100)


@pytest.fixture(scope="module")
def ample(few: Path) -> Setup:
    """Stock's, without speculation."""
    return memory_for_all(few)


@pytest.fixture(scope="module")
def scarce(few: Path) -> Setup:
    """Too few blocks, pooled ones included, for 32 chats at once, and rows for those preempted."""
    other = {**GRAMMAR, **ngram(3)}
    return Setup(few, len(LAYERS), 36, 50, rows=120, dtype="float32", other=other)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return chats(32, 4, 8)


def both(
    engines: Engines, setup: Setup, ample: Setup, requests: list[Record]
) -> tuple[Record, Record]:
    """One round on pie with speculation, and on stock without."""
    (pie,), (stock,) = engines.both(setup, [round_(requests)], ample, [round_(requests)])
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)
    assert pie["accepted"] > 20
    assert pie["drafted"] > pie["accepted"]
    assert not stock["drafted"]
    return pie, stock


@pytest.mark.parametrize("caching", [pytest.param(False, marks=pytest.mark.soak), True])
def test_preempted_requests_come_back(
    engines: Engines, ample: Setup, scarce: Setup, texts: list[str], caching: bool
) -> None:
    """Out of parked KV, which holds no rejected position, with a prefix cache and without."""
    setup = replace(scarce, other={**scarce.other, "enable_prefix_caching": caching})
    pie, stock = both(engines, setup, ample, [request(t, max_tokens=ANSWER) for t in texts])
    assert pie["preempted"]
    assert pie["hits"]["parked"] > 0
    assert tokens(pie) == tokens(stock)


@pytest.mark.soak
def test_turns(engines: Engines, ample: Setup, scarce: Setup, texts: list[str]) -> None:
    """A request that is left out of a step has its drafts verified in the next."""
    setup = replace(scarce, target=0.01, emulated_link_gbps=0.02)
    pie, stock = both(engines, setup, ample, [request(t, max_tokens=ANSWER) for t in texts])
    assert pie["left_out"] > 0
    assert tokens(pie) == tokens(stock)


def test_structured_output(engines: Engines, ample: Setup, scarce: Setup, texts: list[str]) -> None:
    """Grammars reject drafts beside the model, and cut them short."""
    requests = [
        request(t, max_tokens=ANSWER)
        if i % 2
        else request(t, max_tokens=ANSWER, ignore_eos=False, structured={"regex": "([a-z] ){6,9}"})
        for i, t in enumerate(texts)
    ]
    pie, stock = both(engines, scarce, ample, requests)
    assert tokens(pie) == tokens(stock)


def test_a_block_with_a_rejected_tail_shows(
    engines: Engines, ample: Setup, scarce: Setup, texts: list[str]
) -> None:
    """Negative control: drafts count as computed when they are scheduled; also an error may tell.

    A rejected position is written again in a pooled page, which the next load brings back as it
    was.
    """
    requests = [request(t, max_tokens=ANSWER) for t in texts]
    right = tokens(engines.run(ample, [round_(requests)], "stock")[0])
    try:
        (pie,) = engines.run(replace(scarce, hasty_blocks=True), [round_(requests)])
    except EngineError:
        return
    assert tokens(pie) != right

"""Real model: with parked KV, preempted and returning chats answer as if nothing had been evicted.

In float32, because the batches differ from stock's, which has memory for everything and no prefix
cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_diverse, check_traffic, tokens
from tests.helpers.engine_model import LAYERS

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ANSWER = 32
Record = dict[str, Any]


@pytest.fixture(scope="module")
def ample(few: Path) -> Setup:
    """What stock runs with."""
    return Setup(few, len(LAYERS), 400, 0, dtype="float32")


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """Too few blocks for the chats, hardly any pooled ids, and rows for all of them."""
    other = {"enable_prefix_caching": True, "max_num_batched_tokens": 256}
    return Setup(few, len(LAYERS), 40, 6, dtype="float32", rows=400, other=other)


@pytest.fixture(scope="module")
def first_turn(few: Path) -> list[list[int]]:
    """Chats as token ids: text would not be cut into the same tokens again."""
    tokenizer = Tokenizer.from_file(str(few / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in chats(24, 8, 8)]


def asked(prompts: list[list[int]]) -> Record:
    return round_([request(prompt, max_tokens=ANSWER) for prompt in prompts])


@pytest.fixture(scope="module")
def rounds(engines: Engines, ample: Setup, first_turn: list[list[int]]) -> list[Record]:
    """Both turns of all chats: the second has the first, stock's answer and a next question."""
    (stock,) = engines.run(ample, [asked(first_turn)], "stock")
    (question,) = first_turn[:1]
    second = [
        [*prompt, *answer, i, *question[:20]]
        for i, (prompt, (answer,)) in enumerate(zip(first_turn, tokens(stock), strict=True))
    ]
    return [asked(first_turn), asked(second)]


@pytest.fixture(scope="module")
def stock(engines: Engines, ample: Setup, rounds: list[Record]) -> list[Record]:
    """Stock's answers of both turns."""
    records = engines.run(ample, rounds, "stock")
    check_diverse(records[0])
    return records


def test_preempted_and_returning_chats(
    engines: Engines, setup: Setup, rounds: list[Record], stock: list[Record]
) -> None:
    """Nothing is computed twice: neither after a preemption nor in the next turn."""
    first, second = engines.run(setup, rounds)
    for pie, right in zip((first, second), stock, strict=True):
        assert pie["preempted"]
        assert tokens(pie) == tokens(right)
        assert pie["recomputed_tokens"] == 0
        check_traffic(pie, setup.page * setup.layers)
    for answer, before in zip(second["answers"], first["answers"], strict=True):
        known = before["prompt_tokens"] + ANSWER - 1
        assert answer["cached_tokens"] >= known // setup.block_size * setup.block_size
    assert second["hits"]["parked"] > 100
    assert second["ahead_blocks"] > 10


def test_without_parking_they_are_computed_again(
    engines: Engines, setup: Setup, rounds: list[Record], stock: list[Record]
) -> None:
    """As exact, and what the test above shows is not there."""
    first, second = engines.run(replace(setup, parking="off"), rounds)
    assert [tokens(first), tokens(second)] == [tokens(right) for right in stock]
    assert second["recomputed_tokens"] > 0
    assert second["hits"]["parked"] == 0


@pytest.mark.parametrize("debug", ["skip_loads", "skip_stores"])
def test_a_broken_engine_shows(
    engines: Engines, setup: Setup, rounds: list[Record], stock: list[Record], debug: str
) -> None:
    """Negative control: parked KV that was not stored, or does not come back."""
    found = engines.run(replace(setup, debug=(debug,)), rounds)
    assert [tokens(pie) for pie in found] != [tokens(right) for right in stock]

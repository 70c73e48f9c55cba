"""Real model: with parked KV, preempted and returning chats answer as if nothing had been evicted.

In float32, because the batches differ from stock's, which has memory for everything and no prefix
cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engine import Engines, Setup, request
from tests.helpers.engine_load import chats, check_diverse, tokens
from tests.helpers.engine_model import LAYERS
from tests.helpers.two_turns import check_kept, encoded, two_turns

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
def turns(engines: Engines, ample: Setup) -> tuple[list[Record], list[Record]]:
    """Both turns of all chats, and stock's answers."""
    prompts = encoded(ample.model, chats(24, 8, 8))
    found = two_turns(engines, ample, [request(p, max_tokens=ANSWER) for p in prompts])
    check_diverse(found[1][0])
    return found


@pytest.fixture(scope="module")
def rounds(turns: tuple[list[Record], list[Record]]) -> list[Record]:
    """Both turns of all chats."""
    return turns[0]


@pytest.fixture(scope="module")
def stock(turns: tuple[list[Record], list[Record]]) -> list[Record]:
    """Stock's answers of both turns."""
    return turns[1]


def test_preempted_and_returning_chats(
    engines: Engines, setup: Setup, rounds: list[Record], stock: list[Record]
) -> None:
    """Nothing is computed twice: neither after a preemption nor in the next turn."""
    first, second = engines.run(setup, rounds)
    check_kept(setup, [first, second], stock)
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


def test_without_a_prefix_cache_preempted_chats_find_their_own(
    engines: Engines, setup: Setup, rounds: list[Record], stock: list[Record]
) -> None:
    """As exact, and nothing is computed twice; without parking, much is."""
    setup = replace(setup, other={**setup.other, "enable_prefix_caching": False})
    (kept,) = engines.run(setup, rounds[:1])
    (again,) = engines.run(replace(setup, parking="off"), rounds[:1])
    for record in (kept, again):
        assert record["preempted"]
        assert tokens(record) == tokens(stock[0])
    assert kept["recomputed_tokens"] == 0
    assert kept["hits"]["parked"] > 0
    assert again["recomputed_tokens"] > 200


@pytest.mark.parametrize("debug", ["skip_loads", "skip_stores"])
def test_a_broken_engine_shows(
    engines: Engines, setup: Setup, rounds: list[Record], stock: list[Record], debug: str
) -> None:
    """Negative control: parked KV that was not stored, or does not come back."""
    found = engines.run(replace(setup, debug=(debug,)), rounds)
    assert [tokens(pie) for pie in found] != [tokens(right) for right in stock]

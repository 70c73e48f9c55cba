"""The pool's memory follows the load in real vLLM, and no token changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_traffic, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

IDLE = 0.5
ANSWER = 16


def test_memory_is_taken_for_a_load_and_given_back_after_it(engines: Engines, model: Path) -> None:
    """Two waves with an idle time between: memory of the process, prefixes, tokens."""
    setup = Setup(
        model,
        30,
        20,
        90,
        dtype="float32",
        idle_seconds=IDLE,
        other={"enable_prefix_caching": True},
    )
    load = [request(text, max_tokens=ANSWER) for text in chats(16, 14, 6)]
    rounds = [round_(load), round_(load[:1], idle=4 * IDLE), round_(load[::-1])]
    pie, stock = engines.both(setup, rounds)
    assert [tokens(record) for record in pie] == [tokens(record) for record in stock]
    row = setup.page * setup.layers
    check_traffic(pie[0], row)
    check_traffic(pie[2], row)
    chunk = pie[1]["pool_bytes_before"]
    grown = pie[0]["counters"]["pool_bytes"]
    assert 0 < chunk <= 64 << 20
    assert grown >= 2 * chunk
    assert pie[2]["counters"]["pool_bytes"] >= 2 * chunk
    assert pie[1]["counters"]["host_bytes"] == setup.pooled * row
    returned = pie[0]["resident_bytes"][1] - pie[1]["resident_bytes"][0]
    assert returned > 0.9 * (grown - chunk)

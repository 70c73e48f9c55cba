"""Real vLLM while the pool's memory comes late, not at all, or goes: no token changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import pool_faults
from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_diverse, tokens
from tests.helpers.engine_model import LAYERS
from tests.helpers.two_ranks import CORES, rounds, two_rank_model, two_rank_setup

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 1 << 20
IDLE = 0.3
REFUSED = "Pie: the CPU pool stays at"


@pytest.fixture(scope="module")
def small_chunks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines whose pool has many chunks of three rows each."""
    shared = Engines(tmp_path_factory.mktemp("small"), pool_faults.environment(CHUNK))
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """Few residents, and parked KV."""
    other = {"enable_prefix_caching": True}
    return Setup(few, len(LAYERS), 24, 90, dtype="float32", idle_seconds=IDLE, other=other)


def test_a_worker_later_than_the_idle_time_changes_no_token(
    small_chunks: Engines, engines: Engines, setup: Setup
) -> None:
    """A step is queued while the worker is stopped for longer than the pool is kept.

    What the idle engine left to the worker is gone then, and is asked for before it is used: the
    chats are computed again. Without a pause they are restored, so the pause is what is seen.
    """
    load = [request(text, max_tokens=8) for text in chats(12, 14, 6)]
    late = [round_(load), round_(load, idle=0.001, late=4 * IDLE), round_(load[::-1])]
    soon = [round_(load), round_(load, idle=0.001), round_(load[::-1])]
    (stock,) = engines.run(replace(setup, other={}), [round_(load)], "stock")
    check_diverse(stock)
    stopped, went_on = small_chunks.run(setup, late), small_chunks.run(setup, soon)
    for record in (*stopped[:2], *went_on[:2]):
        assert tokens(record) == tokens(stock)
    assert tokens(stopped[2]) == tokens(went_on[2]) == tokens(stock)[::-1]
    assert went_on[1]["hits"]["parked"] > stopped[1]["hits"]["parked"]


def test_chunks_that_cannot_be_had_make_the_pool_smaller(
    engines: Engines, setup: Setup, tmp_path: Path
) -> None:
    """In the middle of a load: nothing ends, no answer changes, and it is said once."""
    load = [request(text, max_tokens=24) for text in chats(16, 14, 6)]
    (stock,) = engines.run(replace(setup, other={}), [round_(load)], "stock")
    short = Engines(tmp_path, pool_faults.environment(CHUNK, {0: 4}))
    try:
        found = short.run(setup, [round_(load), round_(load[::-1])])
    finally:
        short.close()
    assert tokens(found[0]) == tokens(stock)
    assert tokens(found[1]) == tokens(stock)[::-1]
    counters = found[1]["counters"]
    assert counters["pool_refused"] > 0
    assert counters["pool_bytes"] <= 4 * CHUNK
    assert found[0]["moved"]["bytes_loaded"] > 0
    assert short.log("pie").count(REFUSED) == 1


def test_a_chunk_refused_to_the_rank_without_output_is_heard(few: Path, tmp_path: Path) -> None:
    """vLLM returns the first rank's output alone; the second has no memory for a third chunk."""
    setup = two_rank_setup(two_rank_model(few, tmp_path / "model"))
    faults = pool_faults.environment(CHUNK, {1: 2})
    short = Engines(tmp_path, {**faults, **CORES})
    try:
        (pie,) = short.run(setup, rounds())
        (stock,) = short.run(setup, rounds(), "stock")
    finally:
        short.close()
    assert tokens(pie) == tokens(stock)
    check_diverse(stock)
    assert pie["moved"]["bytes_loaded"] > 0
    assert pie["counters"]["pool_bytes"] <= 2 * CHUNK, "the first rank gives back what is no use"
    assert short.log("pie").count(REFUSED) == 1

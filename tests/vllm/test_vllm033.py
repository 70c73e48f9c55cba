"""vLLM 0.33: its Python runs pie over 0.32's libraries for CPUs, with the V1 and the V2 runner.

0.33 has no build for CPUs. With V2 two steps are in flight and the CUDA driver is pie's, on its
stand-in: what a GPU has by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cuda_on_cpu, other_vllm, v2_on_cpu
from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_diverse, check_traffic, ngram, tokens
from tests.helpers.engine_model import LAYERS
from tests.helpers.model_runs import (
    check_came_back,
    check_same,
    long_rounds,
    parking,
    pie_setup,
    rounds,
    stock_setup,
    with_prefix_caching,
)
from tests.helpers.small_models import FAMILIES, make

pytestmark = [pytest.mark.vllm, pytest.mark.slow, other_vllm.needed]

ASKED = round_([request(text, max_tokens=24) for text in chats(10, 4, 8)])


@pytest.fixture(scope="module", params=["V1", "V2"])
def runner(request: pytest.FixtureRequest) -> str:
    """One of vLLM's two model runners."""
    return str(request.param)


@pytest.fixture(scope="module")
def newer(runner: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of vLLM 0.33."""
    folder = tmp_path_factory.mktemp("vllm033")
    environment = other_vllm.environment(folder / "cache")
    if runner == "V2":
        environment |= {**v2_on_cpu.ENVIRONMENT, v2_on_cpu.ASYNC: "1"}
        environment |= cuda_on_cpu.environment(folder / "report")
    shared = Engines(folder, environment)
    yield shared
    shared.close()
    if runner == "V2":
        assert cuda_on_cpu.found_wrong(folder / "report") == []


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """Few residents for ten chats."""
    other: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    return Setup(few, len(LAYERS), 24, 60, dtype="float32", other=other)


def test_tokens_are_stocks(newer: Engines, setup: Setup, runner: str) -> None:
    """Blocks move between the tiers while requests run, and no token changes."""
    (pie,), (stock,) = newer.both(setup, [ASKED])
    for record in (pie, stock):
        assert record["vllm"] == other_vllm.RELEASE
        assert record["v2_runner"] == (runner == "V2")
        assert record["most_in_flight"] == (2 if runner == "V2" else 1)
    assert pie["schedule"] == stock["schedule"]
    assert tokens(pie) == tokens(stock)
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)


@pytest.mark.parametrize("runner", ["V1"], indirect=True)
def test_tokens_and_drafts_by_ngrams_are_stocks(newer: Engines, setup: Setup) -> None:
    """On the same schedule, though rejected tokens are written over; V2 needs Triton for them."""
    speculative = replace(setup, other={**setup.other, **ngram(3)})
    (pie,), (stock,) = newer.both(speculative, [ASKED])
    assert pie["vllm"] == other_vllm.RELEASE
    for what in ("schedule", "drafts", "answers"):
        assert pie[what] == stock[what], what
    assert pie["drafted"] > pie["accepted"] > 10
    check_traffic(pie, setup.page * setup.layers)


@pytest.mark.parametrize("runner", ["V1"], indirect=True)
def test_parked_chats_answer_as_stock(newer: Engines, setup: Setup) -> None:
    """Preempted and asked again: nothing is computed twice, and no token changes."""
    other = {"enable_prefix_caching": True, "max_num_batched_tokens": 128}
    parked = replace(setup, resident=26, pooled=6, rows=200, other=other)
    (stock,) = newer.run(setup, [ASKED], "stock")
    first, again = newer.run(parked, [ASKED, ASKED])
    assert first["preempted"]
    assert tokens(first) == tokens(again) == tokens(stock)
    assert first["recomputed_tokens"] == 0
    assert again["hits"]["parked"] > 10


@pytest.mark.parametrize("runner", ["V1"], indirect=True)
def test_a_hybrids_tokens_are_stocks(newer: Engines, tmp_path: Path) -> None:
    """Full attention is pooled, and sliding windows lie beside it."""
    model = make("gemma3", tmp_path / "gemma3")
    (stock,) = newer.run(stock_setup("gemma3", model), rounds(), "stock")
    sizes = pie_setup("gemma3", model, stock)
    (pie,) = newer.run(sizes, rounds())
    assert pie["vllm"] == other_vllm.RELEASE
    check_same(pie, stock, sizes)


@pytest.mark.parametrize("runner", ["V1"], indirect=True)
def test_a_preempted_state_comes_back_with_prefix_caching(newer: Engines, tmp_path: Path) -> None:
    """It is in the block where 0.33 looks for it."""
    model, chunk = make("nemotron-h", tmp_path / "nemotron-h"), FAMILIES["nemotron-h"].cached_chunk
    asked = with_prefix_caching(stock_setup("nemotron-h", model), chunk)
    (stock,) = newer.run(asked, long_rounds(), "stock")
    setup = with_prefix_caching(parking(pie_setup("nemotron-h", model, stock)), chunk)
    (pie,) = newer.run(setup, long_rounds())
    assert pie["vllm"] == other_vllm.RELEASE
    check_came_back(pie, stock, setup.block_size)

"""Two ranks carry out the same plans, each on its heads and with its own pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pie_vllm.plan import Prior
from pie_vllm.vllm.worker_side import ranks
from tests.helpers import cuda_on_cpu, failing_ranks
from tests.helpers.draft_runs import accepted_length
from tests.helpers.engine import EngineError, Engines, Setup
from tests.helpers.engine_load import check_diverse, check_traffic, tokens
from tests.helpers.failing_engine import Order
from tests.helpers.two_ranks import CORES, rounds, two_rank_model, two_rank_setup

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

METRICS = {"disable_log_stats": False}


@pytest.fixture(scope="module")
def setup(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Few residents on each of two ranks."""
    return two_rank_setup(two_rank_model(few, tmp_path_factory.mktemp("ranks") / "model"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines whose ranks have a core each, over the CUDA driver on its stand-in."""
    folder = tmp_path_factory.mktemp("two")
    shared = Engines(folder, {**cuda_on_cpu.environment(folder / "report"), **CORES})
    yield shared
    shared.close()
    assert cuda_on_cpu.found_wrong(folder / "report") == []


def test_tokens_are_stocks(two_ranks: Engines, setup: Setup) -> None:
    """Tokens of pie on two ranks are stock's on two ranks."""
    (pie,), (stock,) = two_ranks.both(setup, rounds())
    assert pie["schedule"] == stock["schedule"]
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)
    assert pie["counters"]["rows"] == setup.pooled, "each rank takes its share of --pie-pool-gib"
    assert tokens(pie) == tokens(stock)


@pytest.mark.soak
def test_without_loads_they_are_not(two_ranks: Engines, setup: Setup) -> None:
    """Negative control."""
    (broken,) = two_ranks.run(replace(setup, debug=("skip_loads",)), rounds())
    (stock,) = two_ranks.run(setup, rounds(), "stock")
    assert broken["schedule"] == stock["schedule"]
    assert tokens(broken) != tokens(stock)


@pytest.mark.soak
def test_a_draft_model_on_two_ranks(two_ranks: Engines, setup: Setup) -> None:
    """It is the model itself: each draft is right if each rank has all its KV; else fewer are."""
    drafts = 2
    speculative = {
        "method": "draft_model",
        "model": str(setup.model),
        "num_speculative_tokens": drafts,
    }
    other = {**setup.other, "max_num_batched_tokens": 4096, "speculative_config": speculative}
    drafting = replace(setup, drafts=setup.layers, resident=36, other=other)
    (pie,), (stock,) = two_ranks.both(drafting, rounds())
    (blind,) = two_ranks.run(replace(drafting, debug=("skip_drafts",)), rounds())
    check_diverse(stock)
    assert pie["moved"]["bytes_loaded"] > 0
    for record in (pie, blind):
        assert tokens(record) == tokens(stock)
    assert accepted_length(pie) > 0.98 * accepted_length(stock) > drafts
    assert accepted_length(blind) < 0.9 * accepted_length(stock)


FAILING: list[Order] = [
    ("stores", 1, "store", 1),
    ("loads", 2, "load", 1),
    ("loads", 3, "load", 5),
    ("stores", 1, "store", 4),
    ("loads", 0, "load", 1),
]


def answers(folder: Path, setup: Setup, environment: dict[str, str]) -> dict[str, Any]:
    """What two ranks answer on which copies fail."""
    folder.mkdir()
    engines = Engines(folder, {**environment, **CORES})
    try:
        (found,) = engines.run(replace(setup, other={**setup.other, **METRICS}), rounds())
    finally:
        engines.close()
    return found


def test_copies_that_fail_on_any_rank(two_ranks: Engines, setup: Setup, tmp_path: Path) -> None:
    """The answers are stock's and the engine lives.

    Copies fail on the second rank, whose outputs vLLM never sees, and in one step on both.
    """
    (stock,) = two_ranks.run(setup, rounds(), "stock")
    orders = {1: FAILING, 0: FAILING[:1]}
    heard = answers(tmp_path / "heard", setup, failing_ranks.environment(orders))
    assert tokens(heard) == tokens(stock)
    assert heard["failed"] == len(FAILING)
    assert heard["metrics"]["vllm:pie_failed_copies"] == len(FAILING)
    assert heard["preempted"], "nobody was computed again"


@pytest.mark.soak
def test_failed_copies_that_are_not_heard_of_show(
    two_ranks: Engines, setup: Setup, tmp_path: Path
) -> None:
    """Negative control: where the first rank hears of none, answers are wrong."""
    (stock,) = two_ranks.run(setup, rounds(), "stock")
    unheard = failing_ranks.environment({1: FAILING}, heard=False)
    spoilt = answers(tmp_path / "unheard", setup, unheard)
    assert spoilt["failed"] == 0
    assert tokens(spoilt) != tokens(stock)


@pytest.mark.soak
def test_a_rank_that_fails_ends_the_engine(setup: Setup, tmp_path: Path) -> None:
    """No token of a step that failed is returned; vLLM by itself would go on."""
    engines = Engines(tmp_path, CORES)
    with pytest.raises(EngineError):
        engines.run(replace(setup, debug=("skip_gate",)), rounds())
    engines.close()
    assert "a step failed on rank 1" in engines.log("pie")


def test_the_slowest_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least bandwidth and the longest step; what one rank does not know, none does."""
    mine = Prior(bandwidth=20e9, step_seconds=0.01, request_seconds=1e-4, prompt_seconds=2e-5)
    theirs = (15e9, -0.02, -0.003, -5e-5, -3e-5)

    def least(*values: float) -> tuple[float, ...]:
        return tuple(map(min, zip(values, theirs, strict=True)))

    monkeypatch.setattr(ranks, "least", least)
    found = ranks.slowest(mine)
    assert found == mine._replace(
        bandwidth=15e9, step_seconds=0.02, attention_seconds=0.003, prompt_seconds=3e-5
    )
    theirs = (0.0, 0.0, 0.0, 0.0, 0.0)
    assert ranks.slowest(Prior()) == Prior()
    assert ranks.slowest(mine).bandwidth is None

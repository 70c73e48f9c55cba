"""Drafters with layers of their own: pie's tokens and drafts are stock's, one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.draft_runs import (
    accepted_length,
    check_same_drafts,
    pie_setup,
    replayed_rounds,
    returning_rounds,
    small_window,
    stock_setup,
    with_prefix_caching,
    wrong_drafts,
)
from tests.helpers.engine import Engines
from tests.helpers.engine_load import tokens
from tests.helpers.model_runs import rounds

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of models and drafters."""
    return tmp_path_factory.mktemp("draft-models")


def later(name: str, k: int) -> Any:
    """A case for ``make soak``."""
    return pytest.param(name, k, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("eagle", 3),
        later("eagle", 1),
        later("eagle", 5),
        later("eagle3", 3),
        ("draft_model", 3),
        later("draft_model", 1),
        ("mtp", 1),
        later("mtp", 3),
    ],
)
def test_tokens_and_drafts_are_stocks(engines: Engines, folder: Path, name: str, k: int) -> None:
    """With most blocks of 32 requests in the pool."""
    setup = stock_setup(name, folder, k)
    (stock,) = engines.run(setup, rounds(), "stock")
    (pie,) = engines.run(pie_setup(name, setup, stock), rounds())
    check_same_drafts(pie, stock)


@pytest.mark.parametrize("name", ["eagle"])
def test_drafts_show_pages_that_are_not_filled(engines: Engines, folder: Path, name: str) -> None:
    """The tokens are right all the same."""
    setup = stock_setup(name, folder, 3)
    (stock,) = engines.run(setup, rounds(), "stock")
    broken = replace(pie_setup(name, setup, stock), debug=("skip_drafts",))
    (pie,) = engines.run(broken, rounds())
    assert tokens(pie) == tokens(stock)
    wrong, places = wrong_drafts(pie, stock)
    assert wrong * 10 > places, f"only {wrong} of {places} drafts are wrong"


@pytest.mark.parametrize("name", ["eagle"])
def test_accepted_drafts(engines: Engines, folder: Path, name: str) -> None:
    """Most are accepted, and rejections are at block ends, where blocks become complete."""
    setup = stock_setup(name, folder, 3)
    (known,) = engines.run(setup, rounds(), "stock")
    load = replayed_rounds(known, setup.block_size)
    (stock,) = engines.run(setup, load, "stock")
    (pie,) = engines.run(pie_setup(name, setup, known), load)
    assert tokens(stock) == tokens(known)
    check_same_drafts(pie, stock)
    assert accepted_length(pie) > 2
    assert pie["drafted"] > pie["accepted"] > 0


@pytest.mark.parametrize("name", ["eagle"])
def test_preempted_requests(engines: Engines, folder: Path, name: str) -> None:
    """Their parked rows hold the pages of draft layers."""
    setup = stock_setup(name, folder, 3)
    (stock,) = engines.run(setup, rounds(), "stock")
    (pie,) = engines.run(small_window(pie_setup(name, setup, stock)), rounds())
    check_same_drafts(pie, stock, mostly_pooled=False)
    assert pie["preempted"], "nobody was preempted"
    assert pie["recomputed_tokens"] == 0


@pytest.mark.parametrize("name", ["eagle"])
def test_prompts_that_come_back(engines: Engines, folder: Path, name: str) -> None:
    """Parked hits lack their last block, as vLLM's own do."""
    setup = with_prefix_caching(stock_setup(name, folder, 3))
    first, stock = engines.run(setup, returning_rounds(), "stock")
    settings = with_prefix_caching(pie_setup(name, setup, first, rows=1000))
    once, pie = engines.run(settings, returning_rounds())
    check_same_drafts(pie, stock, mostly_pooled=False, before=(once,))
    cached = [[answer["cached_tokens"] for answer in run["answers"]] for run in (pie, stock)]
    assert cached[0] == cached[1]
    assert pie["hits"]["parked"] > 0, pie["hits"]

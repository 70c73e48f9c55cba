"""Drafters with layers of their own on vLLM's V2 runner, the default on CUDA.

It runs as in ``test_v2_runner``, so loads are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.draft_runs import accepted_length, check_same_drafts, pie_setup, stock_setup
from tests.helpers.engine import Engines, request, round_
from tests.helpers.engine_load import tokens
from tests.helpers.model_runs import prompts
from tests.helpers.v2_engines import v2_engines

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.soak]

REQUESTS = 8
DRAFTS = 2
RESIDENT = 2 * REQUESTS + 4
Runs = tuple[dict[str, Any], dict[str, Any]]
ROUNDS = [round_([request(prompt, max_tokens=40) for prompt in prompts()[:REQUESTS]])]


@pytest.fixture(scope="module", params=[1, 2], ids=lambda n: f"{n} in flight")
def in_flight(request: pytest.FixtureRequest) -> int:
    """Steps in flight."""
    return int(request.param)


@pytest.fixture(scope="module")
def engines(in_flight: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines with the V2 runner; with two steps in flight over the CUDA driver's stand-in."""
    with v2_engines(tmp_path_factory.mktemp("v2-drafts"), in_flight) as shared:
        yield shared


@pytest.fixture
def runs(engines: Engines, in_flight: int, tmp_path: Path) -> Callable[..., Runs]:
    """Runs stock and pie with a drafter, where both run as they are meant to."""

    def run(name: str, **more: Any) -> Runs:
        setup = stock_setup(name, tmp_path, DRAFTS)
        (stock,) = engines.run(setup, ROUNDS, "stock")
        settings = pie_setup(name, setup, stock, resident=RESIDENT, **more)
        (pie,) = engines.run(settings, ROUNDS)
        for record in (pie, stock):
            assert record["v2_runner"]
            assert record["most_in_flight"] == in_flight
        assert pie["moved"]["bytes_loaded"] > pie["moved"]["bytes_stored"] > 0
        return pie, stock

    return run


@pytest.mark.parametrize("name", ["eagle", "draft_model"])
def test_drafts_are_stocks(runs: Callable[..., Runs], in_flight: int, name: str) -> None:
    """One by one, where they leave the runner: with one step in flight."""
    if in_flight > 1:
        pytest.skip("drafts stay in the runner; the next test counts what is accepted")
    pie, stock = runs(name)
    check_same_drafts(pie, stock)


def test_what_is_right_is_accepted(runs: Callable[..., Runs]) -> None:
    """The draft model is the model itself: each draft is right if all its KV is."""
    pie, stock = runs("draft_model")
    assert tokens(pie) == tokens(stock)
    for record in (pie, stock):
        assert accepted_length(record) > DRAFTS


def test_pages_that_are_not_filled_show(runs: Callable[..., Runs]) -> None:
    """Negative control: tokens are right all the same, and fewer drafts are accepted."""
    pie, stock = runs("draft_model", debug=("skip_drafts",))
    assert tokens(pie) == tokens(stock)
    assert accepted_length(pie) < 0.9 * accepted_length(stock)

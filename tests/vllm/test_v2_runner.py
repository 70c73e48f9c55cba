"""vLLM's V2 model runner, the default on CUDA: the same tokens with moved blocks.

On a CPU it runs here with its Triton kernels in Triton's interpreter
(tests/helpers/v2_on_cpu.py), so loads are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pie_vllm.errors import UnsupportedError
from pie_vllm.plan import Relabel
from pie_vllm.vllm.compat import model_runner
from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_diverse, check_traffic, tokens
from tests.helpers.engine_model import LAYERS
from tests.helpers.v2_engines import v2_engines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUNDS = [round_([request(text, max_tokens=24) for text in chats(10, 4, 8)])]


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.soak), 2],
    ids=lambda n: f"{n} in flight",
)
def in_flight(request: pytest.FixtureRequest) -> int:
    """Steps in flight."""
    return int(request.param)


@pytest.fixture(scope="module")
def engines(in_flight: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines with the V2 runner, without and with asynchronous scheduling."""
    with v2_engines(tmp_path_factory.mktemp("v2"), in_flight) as shared:
        yield shared


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """Few residents for ten chats."""
    other: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    return Setup(few, len(LAYERS), 24, 60, dtype="float32", other=other)


def test_tokens_are_stocks(engines: Engines, setup: Setup, in_flight: int) -> None:
    """Blocks move between the tiers while requests run, and no token changes."""
    (pie,), (stock,) = engines.both(setup, ROUNDS)
    for record in (pie, stock):
        assert record["v2_runner"]
        assert record["most_in_flight"] == in_flight
    assert pie["schedule"] == stock["schedule"]
    assert tokens(pie) == tokens(stock)
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)


def test_a_copy_that_fails_costs_a_recompute(
    engines: Engines, setup: Setup, in_flight: int
) -> None:
    """Also with a step in flight behind the failed one, whose results are dropped, too."""
    (round_,) = ROUNDS
    if in_flight == 2:
        failing = {**round_, "fail": ["cuMemcpyBatchAsync", 100, 2]}
    else:
        failing = {**round_, "failing": [("loads", 3, "load", 5)]}
    (pie,), (stock,) = engines.both(setup, [failing], setup, ROUNDS)
    assert pie["failed"] == 1
    assert pie["preempted"]
    assert tokens(pie) == tokens(stock)


def test_without_relabels_tokens_differ(engines: Engines, setup: Setup) -> None:
    """The test above can fail: where the block tables keep the old ids, answers are others."""
    (pie,), (stock,) = engines.both(replace(setup, lost_relabels=True), ROUNDS, setup)
    assert pie["schedule"] == stock["schedule"]
    assert tokens(pie) != tokens(stock)


def test_blocks_that_the_runner_does_not_know_are_an_error() -> None:
    """Of unknown requests, and beyond a row's end, where new blocks are staged."""
    written: list[tuple[int, int, tuple[int, ...]]] = []
    table = SimpleNamespace(stage_write=lambda *write: written.append(write))
    runner = SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={"a": 3}),
        block_tables=SimpleNamespace(
            block_tables=[table],
            num_blocks=SimpleNamespace(np=np.array([[0, 0, 0, 5]])),
        ),
    )
    model_runner.relabel_rows(runner, [Relabel("a", 3, (9, 8))], 0)
    assert written == [(3, 3, (9, 8))]
    with pytest.raises(UnsupportedError, match="knows 5 blocks"):
        model_runner.relabel_rows(runner, [Relabel("a", 3, (9, 8, 7))], 0)
    with pytest.raises(UnsupportedError, match="request b is not known"):
        model_runner.relabel_rows(runner, [Relabel("b", 0, (9,))], 0)
    assert len(written) == 1

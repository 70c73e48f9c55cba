"""vLLM's V2 model runner, the default on CUDA: the same tokens with moved blocks.

On a CPU it runs here with its Triton kernels in Triton's interpreter
(tests/helpers/v2_on_cpu.py), so loads are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import v2_on_cpu
from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_diverse, check_traffic, tokens
from tests.helpers.engine_model import LAYERS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUNDS = [round_([request(text, max_tokens=24) for text in chats(10, 4, 8)])]


@pytest.fixture(scope="module", params=["one step in flight", "two steps in flight"])
def v2_engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """Engines with the V2 runner, without and with asynchronous scheduling."""
    more = {v2_on_cpu.ASYNC: "1"} if request.param == "two steps in flight" else {}
    shared = Engines(tmp_path_factory.mktemp("v2"), {**v2_on_cpu.ENVIRONMENT, **more})
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """Few residents for ten chats."""
    other: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    return Setup(few, len(LAYERS), 24, 60, dtype="float32", other=other)


def test_tokens_are_stocks(v2_engines: Engines, setup: Setup) -> None:
    """Blocks move between the tiers while requests run, and no token changes."""
    (pie,), (stock,) = v2_engines.both(setup, ROUNDS)
    assert pie["v2_runner"]
    assert stock["v2_runner"]
    assert pie["schedule"] == stock["schedule"]
    assert tokens(pie) == tokens(stock)
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)


def test_without_relabels_tokens_differ(v2_engines: Engines, setup: Setup) -> None:
    """The test above can fail: where the block tables keep the old ids, answers are others."""
    (pie,), (stock,) = v2_engines.both(replace(setup, lost_relabels=True), ROUNDS, setup)
    assert pie["schedule"] == stock["schedule"]
    assert tokens(pie) != tokens(stock)

"""vLLM whose steps load KV inside FULL graphs: the same tokens, and no access out of order.

Graphs and copies are those of a stand-in for libcuda; the model computes layer by layer while a
replay stands at the layer. See tests/helpers/graphs_on_cpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cuda_on_cpu, graphs_on_cpu
from tests.helpers.engine import EngineError, Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_diverse, check_traffic, tokens
from tests.helpers.engine_model import LAYERS

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = [round_([request(text, max_tokens=24, logprobs=5) for text in chats(10, 4, 8)])]


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """Few residents for ten chats, whose steps may load in graphs."""
    other: dict[str, Any] = {"max_num_seqs": 16}
    return Setup(few, len(LAYERS), 24, 60, full_graphs=True, other=other)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-in writes when a process ends."""
    return tmp_path_factory.mktemp("graphs") / "report"


@pytest.fixture(scope="module")
def told(report: Path) -> Iterator[Engines]:
    """Engines over the CUDA driver, with graphs."""
    shared = opened(report, "told")
    yield shared
    shared.close()
    assert cuda_on_cpu.found_wrong(report) == []


def opened(report: Path, how: str) -> Engines:
    """Engines, which are told of replays or not."""
    environment = {**cuda_on_cpu.environment(report), graphs_on_cpu.SWITCH: how}
    return Engines(report.parent, environment)


def test_tokens_are_stocks_with_copies_in_graphs(told: Engines, setup: Setup) -> None:
    """Bit for bit, logprobs too; most steps ran in graphs, and some replays had no plan."""
    (pie,), (stock,) = told.both(setup, ROUNDS)
    assert pie["schedule"] == stock["schedule"]
    assert pie["answers"] == stock["answers"]
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)
    counters = pie["counters"]
    assert counters["graph_steps"] > 15
    assert counters["steps"] > counters["graph_steps"]
    assert pie["cuda"]["graphs"] > counters["graph_steps"]
    assert pie["cuda"]["violations"] == []


def test_without_the_copies_in_the_graphs_tokens_differ(told: Engines, setup: Setup) -> None:
    """The test above can fail: the tables are empty, and nothing else changes."""
    (pie,), (stock,) = told.both(replace(setup, debug=("skip_loads",)), ROUNDS, setup)
    assert pie["counters"]["graph_steps"] > 15
    assert tokens(pie) != tokens(stock)


def test_a_replay_that_the_engine_is_not_told_of_ends_the_step(
    setup: Setup, tmp_path: Path
) -> None:
    """No token of such a step is returned; what it did out of order is seen, too."""
    report = tmp_path / "report"
    engines = opened(report, "untold")
    with pytest.raises(EngineError, match=f"GateError: .*0 gates of {setup.layers}"):
        engines.run(setup, ROUNDS)
    engines.close()
    found = cuda_on_cpu.found_wrong(report)
    assert found
    assert all(line.startswith("unordered") for line in found)

"""vLLM over the CUDA driver: the same tokens, no access out of order, faults that end clearly.

The driver's calls go to a stand-in for libcuda on host memory; see tests/helpers/cuda_on_cpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cuda_on_cpu
from tests.helpers.engine import EngineError, Engines, Setup, request, round_
from tests.helpers.engine_load import (
    chats,
    check_diverse,
    check_mostly_pooled,
    check_traffic,
    tokens,
)
from tests.helpers.engine_model import LAYERS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SMALL = [round_([request(text, max_tokens=24) for text in chats(10, 4, 8)])]
ROUNDS = [round_([request(text, max_tokens=24, logprobs=5) for text in chats(32, 4, 8)])]


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """As tests/vllm/test_exact.py."""
    return Setup(few, len(LAYERS), 44, 150, slots=3)


Open = Callable[..., Engines]


@pytest.fixture(scope="module")
def small(few: Path) -> Setup:
    """Few residents for ten chats."""
    limits: dict[str, Any] = {"max_num_seqs": 16}
    return Setup(few, len(LAYERS), 24, 60, dtype="float32", other=limits)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Where the stand-in writes when a process ends."""
    return tmp_path / "report"


@pytest.fixture
def cuda_engines(tmp_path: Path, report: Path) -> Iterator[Open]:
    """Engines over the CUDA driver, with other variables if asked for."""
    opened: list[Engines] = []

    def make(**more: str) -> Engines:
        opened.append(Engines(tmp_path, {**cuda_on_cpu.environment(report), **more}))
        return opened[-1]

    yield make
    for engines in opened:
        engines.close()


def check(pie: dict[str, Any], stock: dict[str, Any], block_bytes: int) -> None:
    """Equal answers on equal schedules, copies by the driver, and none out of order."""
    assert pie["schedule"] == stock["schedule"]
    assert pie["answers"] == stock["answers"]
    check_diverse(stock)
    check_traffic(pie, block_bytes)
    assert pie["cuda"]["batches"] > 100
    assert pie["cuda"]["violations"] == []


def test_tokens_are_stocks_and_no_access_is_unordered(
    cuda_engines: Open, setup: Setup, report: Path
) -> None:
    """bf16 on the same schedule; and nothing of the driver is left at the end."""
    engines = cuda_engines()
    (pie,), (stock,) = engines.both(setup, ROUNDS)
    check(pie, stock, setup.page * setup.layers)
    check_mostly_pooled(pie)
    engines.close()
    assert cuda_on_cpu.found_wrong(report) == []


def test_a_load_that_is_not_waited_for_is_found(cuda_engines: Open, small: Setup) -> None:
    """The test above can fail, even where the copy happens to be in time."""
    (pie,) = cuda_engines().run(replace(small, debug=("late_submit",)), SMALL)
    assert any("unordered" in line for line in pie["cuda"]["violations"])


def test_a_call_that_fails_in_service_costs_a_recompute(
    cuda_engines: Open, small: Setup, report: Path
) -> None:
    """No token of that step is returned to those concerned; nothing stays behind."""
    engines = cuda_engines()
    (round_,) = SMALL
    failing = [{**round_, "fail": ["cuMemcpyBatchAsync", 150, 2]}, round_]
    pie, stock = engines.both(small, failing, small, SMALL)
    assert [tokens(one) == tokens(stock[0]) for one in pie] == [True, True]
    assert pie[1]["failed"] == 1
    assert pie[0]["preempted"]
    assert "cuMemcpyBatchAsync: CUDA_ERROR_OUT_OF_MEMORY" in engines.log("pie")
    assert pie[1]["cuda"]["violations"] == []
    engines.close()
    assert cuda_on_cpu.found_wrong(report) == []


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ("register_limit=4096", "lower --pie-pool-gib"),
        ("integrated=1", "UnsupportedError: this GPU shares the CPU's memory"),
    ],
)
def test_a_machine_that_cannot_is_refused_at_start(
    cuda_engines: Open, small: Setup, report: Path, settings: str, text: str
) -> None:
    """The way out is in the error; others are in tests/engine/test_cuda_driver.py."""
    usual = cuda_on_cpu.environment(report)["PIE_STANDIN"]
    engines = cuda_engines(PIE_STANDIN=f"{usual},{settings}")
    with pytest.raises(EngineError, match=text):
        engines.run(small, SMALL)
    engines.close()
    assert cuda_on_cpu.found_wrong(report) == []

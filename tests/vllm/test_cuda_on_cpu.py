"""vLLM over the CUDA driver: the same tokens, no access out of order, faults that end clearly.

The driver's calls go to a stand-in for libcuda on host memory; see tests/helpers/cuda_on_cpu.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import cuda_on_cpu, v2_on_cpu
from tests.helpers.engine import EngineError, Engines, Setup, request, round_
from tests.helpers.engine_load import (
    chats,
    check_diverse,
    check_mostly_pooled,
    check_traffic,
    tokens,
)
from tests.helpers.engine_model import LAYERS
from tests.helpers.two_ranks import CORES, rounds, two_rank_model, two_rank_setup

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
    """Engines over the CUDA driver, with other variables and granularity if asked for."""
    opened: list[Engines] = []

    def make(granularity: int = 4096, **more: str) -> Engines:
        opened.append(Engines(tmp_path, {**cuda_on_cpu.environment(report, granularity), **more}))
        return opened[-1]

    yield make
    for engines in opened:
        engines.close()


def found_wrong(report: Path) -> list[str]:
    """Violations, and what was live when the processes ended."""
    lines = report.read_text().splitlines() if report.exists() else []
    return [line for line in lines if not re.fullmatch(r"process \d+|live:|violations:|", line)]


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
    assert found_wrong(report) == []


def test_a_load_that_is_not_waited_for_is_found(cuda_engines: Open, small: Setup) -> None:
    """The test above can fail, even where the copy happens to be in time."""
    (pie,) = cuda_engines().run(replace(small, debug=("late_submit",)), SMALL)
    assert any("unordered" in line for line in pie["cuda"]["violations"])


@pytest.mark.parametrize(
    ("call", "nth", "text"),
    [
        ("cuMemcpyBatchAsync", 150, "cuMemcpyBatchAsync: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuStreamWaitEvent", 400, "cuStreamWaitEvent: CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_a_call_that_fails_in_service_ends_the_engine_clearly(
    cuda_engines: Open, small: Setup, report: Path, call: str, nth: int, text: str
) -> None:
    """No token of that step is returned; nothing stays behind."""
    engines = cuda_engines()
    (round_,) = SMALL
    with pytest.raises(EngineError, match=text):
        engines.run(small, [{**round_, "fail": [call, nth, 2]}])
    engines.close()
    assert found_wrong(report) == []


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("device_count=0", "no such CUDA device is visible"),
        ("driver_version=11080", "update it"),
        ("register_limit=4096", "lower --pie-pool-gib"),
        ("device_memory=65536", "lower --gpu-memory-utilization"),
    ],
)
def test_a_machine_that_cannot_is_refused_at_start(
    cuda_engines: Open, small: Setup, report: Path, fault: str, text: str
) -> None:
    """The way out is in the error."""
    settings = cuda_on_cpu.environment(report)["PIE_STANDIN"]
    engines = cuda_engines(PIE_STANDIN=f"{settings},{fault}")
    with pytest.raises(EngineError, match=text):
        engines.run(small, SMALL)
    engines.close()
    assert found_wrong(report) == []


def test_two_steps_in_flight_on_the_v2_runner(
    cuda_engines: Open, small: Setup, report: Path
) -> None:
    """CUDA's default runner and scheduling; mappings are larger than pages."""
    granularity = 1 << 16
    engines = cuda_engines(granularity, **v2_on_cpu.ENVIRONMENT, **{v2_on_cpu.ASYNC: "1"})
    room = 2 * (small.layers + small.slots) * granularity
    bytes_ = {"kv_cache_memory_bytes": small.device_bytes + room}
    (pie,) = engines.run(replace(small, other={**small.other, **bytes_}), SMALL)
    (stock,) = engines.run(small, SMALL, "stock")
    assert pie["v2_runner"]
    assert pie["most_in_flight"] == 2
    assert tokens(pie) == tokens(stock)
    check_traffic(pie, small.page * small.layers)
    assert pie["cuda"]["violations"] == []
    engines.close()
    assert found_wrong(report) == []


def test_two_ranks(cuda_engines: Open, few: Path, tmp_path: Path, report: Path) -> None:
    """Each rank, a process of its own, has its memory, its streams and its pool."""
    setup = two_rank_setup(two_rank_model(few, tmp_path / "model"))
    engines = cuda_engines(**CORES)
    (pie,) = engines.run(setup, rounds())
    (stock,) = engines.run(setup, rounds(), "stock")
    assert pie["schedule"] == stock["schedule"]
    assert tokens(pie) == tokens(stock)
    check_traffic(pie, setup.page * setup.layers)
    engines.close()
    assert found_wrong(report) == []
    assert report.read_text().count("process ") >= setup.ranks

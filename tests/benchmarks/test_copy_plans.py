"""The stage `copies` of the GPU check over the stand-in for libcuda: real plans have a rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.copy_plans import QUICK, Mover, Sizes, mixed_runs, real_plans
from benchmarks.gpu.harness.compute import granularity, shape
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.records import Reporter, collect
from pie_vllm.transfer.engine import TransferEngine
from tests.helpers import standin as builds
from tests.helpers.standin import Standin, load

pytestmark = pytest.mark.skipif(builds.include_folder() is None, reason="no cuda.h")


@pytest.fixture
def standin() -> Iterator[Standin]:
    """A CUDA device whose link is slow enough to be measured."""
    found = load()
    found.set(race_check=0)
    yield found
    found.clear()
    found.reset()


def measured(tmp_path: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """The rows of real plans."""
    report = Reporter(tmp_path / "records.jsonl")
    context = Context("cuda", True, (), 100, time.monotonic() + 100, tmp_path, report)
    real_plans(context, sizes, 1e9)
    (rows,) = collect(tmp_path / "records.jsonl")["tables"].values()
    return rows


def test_real_plans_have_a_rate_with_few_repeats(standin: Standin, tmp_path: Path) -> None:
    """Of the device's clock, near that of the link."""
    standin.link(2e9)
    rows = measured(tmp_path, QUICK)
    assert len(rows) == 6
    for row in rows:
        assert 0.2 < row["GBps"] <= 2.1


def test_each_repeat_of_a_real_plan_is_timed(standin: Standin) -> None:
    """A median is one of as many measurements as it says, and none is an estimate."""
    layers, blocks = 3, 8
    sizes = shape(layers, 65536, 4, blocks, 2, 2 * blocks, granularity("cuda"))
    runs = mixed_runs(blocks, 4, 2 * blocks, 4)
    with TransferEngine(sizes, driver="cuda") as engine:
        mover = Mover(engine)
        for speed in (1e8, 8e8, 2e8):
            standin.link(speed)
            assert 0.4 * speed < mover.forward(runs).rate < 1.2 * speed

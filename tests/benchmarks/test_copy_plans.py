"""Plans of the GPU check: real ones have a rate, and pools are registered in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import overlap
from benchmarks.gpu.copy_plans import PIECES, QUICK, Mover, Sizes, mixed_runs, real_plans
from benchmarks.gpu.harness import compute
from benchmarks.gpu.harness.compute import CHUNK_BYTES_MAX, granularity, in_chunks, shape
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.records import Reporter, collect, failed_checks
from pie_vllm.engine.transfer_engine import TransferEngine
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


@pytest.mark.alone
def test_real_plans_have_a_rate_with_few_repeats(standin: Standin, tmp_path: Path) -> None:
    """Of the device's clock, near that of the link."""
    standin.link(2e9)
    rows = measured(tmp_path, QUICK)
    assert len(rows) == 6
    for row in rows:
        assert 0.2 < row["GBps"] <= 2.1


@pytest.mark.alone
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


GIB2 = 2 << 30
"""Bytes that Linux 6.11 to 6.13 fail to register in one piece."""


@pytest.mark.parametrize("page", PIECES)
@pytest.mark.parametrize("layers", [1, 32])
def test_no_chunk_of_the_check_is_too_large_to_register(layers: int, page: int) -> None:
    """Whatever the pool."""
    sizes = shape(layers, page, 4, 1, 1, 4096, 2 << 20)
    assert sizes.chunk_rows * sizes.row_bytes <= CHUNK_BYTES_MAX < GIB2
    full = overlap.Sizes()
    sizes = shape(full.layers, full.page, 5, full.most_blocks, 3, 2 * full.most_blocks, 2 << 20)
    assert sizes.num_chunks > 1


def test_runs_are_divided_where_chunks_end() -> None:
    """All of them are there, in order, and none crosses."""
    runs = mixed_runs(256, 4, 512, 16)
    found = in_chunks(runs, 7)
    for copy in found:
        assert copy.row // 7 == (copy.row + copy.count - 1) // 7

    def pages(copies: list[Any]) -> list[tuple[int, int]]:
        return [(c.block + i, c.row + i) for c in copies for i in range(c.count)]

    assert pages(found) == pages(runs)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row or some: plans name many of them."""
    monkeypatch.setattr(compute, "CHUNK_BYTES_MAX", 3 << 20)


@pytest.mark.usefixtures("small_chunks", "standin")
def test_stages_run_over_several_chunks(tmp_path: Path) -> None:
    """The engine refuses runs that cross from one to the next."""
    assert len(measured(tmp_path, QUICK)) == 6
    compute.CHUNK_BYTES_MAX = 7 * 6 * 8192
    report = Reporter(tmp_path / "overlap.jsonl")
    deadline = time.monotonic() + 100
    context = Context("host", True, ("ring2",), 100, deadline, tmp_path, report)
    overlap.run(context)
    found = collect(tmp_path / "overlap.jsonl")
    assert failed_checks(found) == []
    assert found["tables"]

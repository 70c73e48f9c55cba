"""Steps in graphs of the GPU check, over the stand-in for libcuda: checks hold, and can fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.graph_steps import QUICK, Steps, measure_idle, opened, rounds
from benchmarks.gpu.harness import compute
from benchmarks.gpu.harness.captured import CapturedModel
from benchmarks.gpu.harness.compute import Compute
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.records import Reporter, collect
from pie_vllm.engine.arena import DeviceArena
from tests.helpers import cuda_on_cpu, standin
from tests.helpers.cuda_on_cpu import Touch
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.graph_device import Device, Graph

SIZES = QUICK._replace(layers=4, page=4096, most=12, requests=2)


class Model(CapturedModel):
    """Tells the device what its layers touch."""

    device: Device

    def touch(self, layer: int, write: bool) -> Touch:
        pages = (self._written if write else self._ring)[layer]
        size = pages.stride(0) * pages.element_size()
        return Touch(layer, write, [page.data_ptr() for page in pages], size)

    def touched(self) -> list[Touch]:
        return [self.touch(n, write) for n in range(SIZES.layers) for write in (True, False)]

    def write(self, layer: int, step: int) -> None:
        with self.device.around(self.touch(layer, True)):
            super().write(layer, step)

    def spoil(self) -> None:
        self.device.synchronize()
        super().spoil()

    def attention(self, layer: int, rows: torch.Tensor) -> None:
        with self.device.around(self.touch(layer, False)):
            super().attention(layer, rows)


@pytest.fixture(autouse=True)
def views_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``prepare`` puts in place of a method is taken back at the end of each test."""
    monkeypatch.setattr(DeviceArena, "tensor", DeviceArena.tensor)


@contextmanager
def steps_of(debug: tuple[str, ...] = ()) -> Iterator[Steps]:
    """Steps over the CUDA driver, with graphs of the stand-in."""
    cuda_on_cpu.prepare()
    GatherKernel(standin.load())
    device = Device()
    where = Compute()
    where.stream = device.stream
    where.synchronize = device.synchronize  # type: ignore[method-assign]
    with opened(SIZES, cuda_on_cpu.driver_granularity(), "cuda", debug) as engine:
        engine.graphs.prepare(IMAGE, engine.geometry.pooled_blocks)
        model = Model(engine, where, SIZES.layer, SIZES.requests, SIZES.most)
        model.device = device

        def capture(body: Callable[[], None]) -> Any:
            graph = Graph(device, model.touched)
            graph.body = model.warm_up
            with device.capture(graph):
                body()
            model.wrong.zero_()
            return graph

        yield Steps(engine, where, model, SIZES, capture)
        where.synchronize()
        model.close()
        device.forget_graphs()
    device.close()


@pytest.mark.parametrize("chunk", [1 << 30, 7 * SIZES.layers * SIZES.page])
def test_pages_are_right_with_changing_plans(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads, stores, promotions and steps without a plan; nothing is out of order."""
    monkeypatch.setattr(compute, "CHUNK_BYTES_MAX", chunk)
    with steps_of() as steps:
        rounds(steps, 60)
        steps.engine.drain()
        assert int(steps.model.wrong) == 0
        assert steps.wrong_pages == 0
        assert steps.in_graph > 40
        steps.step(8, 0, in_graph=False)
        assert int(steps.model.wrong) == 0
        assert standin.load().violations() == []


def test_wrong_pages_are_seen() -> None:
    """Loads that are left out."""
    with steps_of(("skip_loads",)) as steps:
        rounds(steps, 12)
        assert int(steps.model.wrong) > 0


def test_idle_steps_are_compared_with_a_graph_without_copies(tmp_path: Path) -> None:
    """The same model, captured without gates; a graph with copies is another one."""
    report = Reporter(tmp_path / "records.jsonl")
    context = Context("cuda", True, (), 100, time.monotonic() + 100, tmp_path, report)
    with steps_of() as steps:
        measure_idle(context, steps)
        steps.step(8, 0)
        steps.engine.drain()
        assert int(steps.model.wrong) == 0
    (row,) = collect(tmp_path / "records.jsonl")["tables"][
        "engine: idle steps, a graph with copies beside one without"
    ]
    assert row["ratio"] > 0
    assert row["layers"] == SIZES.layers

"""A transfer engine that only notes its calls, and cache engines over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pie_vllm.config import PieConfig
from pie_vllm.engine.step_stats import StepStats
from pie_vllm.errors import TransferError
from pie_vllm.plan import NO_RUNS, Copy, StepPlan, runs
from pie_vllm.vllm.compat import cuda_graphs, model_runner
from pie_vllm.vllm.worker_side import cache_engine
from pie_vllm.vllm.worker_side.cache_engine import PieCacheEngine
from tests.helpers import scheduling

GEOMETRY = scheduling.geometry(8, 12)
LAYERS = GEOMETRY.num_layers
PLAN = StepPlan(1, NO_RUNS, NO_RUNS, runs([Copy(8, 0, 2)]), (), forward=True, pooled=2)
STREAM = 7


class Engine:
    """Notes its calls, with those of its graph steps; a step fits a graph if ``fits`` says so."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.geometry = GEOMETRY
        self.calls: list[Any] = []
        self.fits = True
        self.fail: str | None = None
        self.in_graph = False
        self.graphs = self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> None:
            self.calls.append((name, *args, *kwargs.values()) if args or kwargs else name)
            if name == self.fail:
                raise TransferError(f"{name} failed")

        return call

    def begin_step(self, plan: StepPlan, stream: int, *, graph: bool = False) -> bool:
        self.calls.append(("begin_step", plan.step, stream, graph))
        self.in_graph = False
        return graph and self.fits

    def enter(self) -> None:
        self.calls.append("enter")
        if not self.fits:
            raise TransferError("the step does not fit a graph")
        self.in_graph = True

    def end_step(self) -> StepStats:
        self.calls.append("end_step")
        gates = LAYERS if self.in_graph else sum(c[0] == "before_attention" for c in self.calls)
        stall = -1 if self.in_graph else 1
        return StepStats(1, 8192, 0, 0.0, 0.0, 0.0, gates, 2, stall_step=stall)


def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache engines have such an engine, and change nothing else of a runner than its graphs."""
    monkeypatch.setattr(cache_engine, "TransferEngine", Engine)
    monkeypatch.setattr(model_runner, "before_inputs", lambda _, __: None)
    monkeypatch.setattr(cache_engine, "use_graphs", lambda *_, **__: "used")


def opened(full_graphs: bool = True) -> tuple[PieCacheEngine, Engine]:
    """A cache engine over the engine above."""
    pie = PieCacheEngine(PieConfig(full_graphs=full_graphs), GEOMETRY, "host")
    engine: Any = pie._engine
    engine.calls.clear()
    return pie, engine


def warm_up(pie: PieCacheEngine, runner: Any, passes: int | None = None) -> None:
    """Pass the gates once for each FULL graph of the runner, as its captures do."""
    count = len(cuda_graphs.full_graphs(runner)) if passes is None else passes
    with pie.warm_up(runner, lambda: True, lambda: STREAM):
        for _ in range(count):
            forward(pie)


def forward(pie: PieCacheEngine, layers: int = LAYERS) -> None:
    """A forward pass of layers with gates; without, while no engine stands there."""
    gates = pie._switch.engine
    for layer in range(layers):
        if gates is not None:
            gates.before_write(layer)
            gates.before_attention(layer)
            gates.after_attention(layer)

"""Traces of plans and of what a step's compute does, for replay_trace.cpp."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from pie_vllm.engine.native import GeometryStruct, plan_flags
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Runs, StepPlan
from tests.helpers.tagrunner import DictMemory, Work


class TraceMemory(DictMemory):
    """Carries out the plans in Python, and writes them down with the work of each step."""

    def __init__(self, geometry: Geometry, block_size: int) -> None:
        super().__init__(geometry, block_size)
        self.geometry = geometry
        self.steps: list[str] = []

    def run(self, plan: StepPlan | None, work: Work) -> None:
        """As DictMemory, which also checks the work."""
        super().run(plan, work)
        numbers: list[int] = [0]
        if plan is not None:
            numbers = [1, plan.step, int(plan.forward), plan_flags(plan)]
            numbers += _runs(plan.stores) + _runs(plan.promotions)
            numbers += [-1] if plan.loads is None else _runs(plan.loads)
        numbers += [len(work.writes), *chain.from_iterable(work.writes), len(work.reads)]
        for _, block, tags in work.reads:
            numbers += [block, len(tags), *tags.tolist()]
        self.steps.append(" ".join(map(str, numbers)))

    def save(self, path: Path, seed: int) -> None:
        """Write the trace: seed, geometry, number of steps, then a line for each step."""
        sizes = [getattr(self.geometry, field[0]) for field in GeometryStruct._fields_]
        head = " ".join(map(str, (seed, *sizes, len(self.steps))))
        path.write_text("\n".join([head, *self.steps]) + "\n")


def _runs(copies: Runs) -> list[int]:
    return [len(copies), *copies.ravel().tolist()]

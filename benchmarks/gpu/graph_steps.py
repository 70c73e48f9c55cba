"""Steps whose copies are in one CUDA graph, without vLLM: are pages right, and what do they cost?

A decode step of an 8B model's size is captured once, gates and all, as vLLM captures its FULL
graphs, and replayed with plans that change: loads of other rows and of other numbers, with stores
or with promotions beside them, and without a plan. Every ring page that a step loaded is checked by
the step itself. In turns with the same graph without loads, and with the same step and its gates
one by one, as it runs without --pie-full-graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.gpu.harness.captured import Capture, CapturedModel, cuda_capture
from benchmarks.gpu.harness.compute import (
    Compute,
    compute_of,
    granularity,
    in_chunks,
    middle,
    shape,
)
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.decode import SMALL, WRITTEN, LayerShape
from pie_vllm.engine.gather import GatherImage, Images, device_arch, gather_image
from pie_vllm.engine.link_calibration import measure_link
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import PieError
from pie_vllm.plan import Copy, StepPlan, runs

SHARES = (0.1, 0.25, 0.5, 0.8)
"""Of what the link brings while the layers compute."""

IDLE = 1.005
"""Idle steps beside those of a graph without copies, at most."""

PROMOTED = 4
"""Blocks of a step that promotes."""


class Sizes(NamedTuple):
    """Of the model and of what is run.

    Attributes:
        layers: of the model.
        page: bytes of a block in one layer.
        layer: widths.
        requests: of a step.
        most: ring blocks.
        slots: of the ring.
        rounds: of steps that are checked, each with another plan.
        steps: of one measurement.
        turns: of measurements.
    """

    layers: int = 32
    page: int = 65536
    layer: LayerShape = LayerShape()
    requests: int = 32
    most: int = 512
    slots: int = 3
    rounds: int = 2000
    steps: int = 20
    turns: int = 7


QUICK = Sizes(6, 8192, SMALL, 8, 24, 2, 200, 4, 2)


def run(context: Context) -> None:
    """Rounds of changing plans, the control, and what steps cost."""
    if context.dry:
        context.report.note("engine: no graphs without a GPU")
        return
    compute, unit = compute_of(context.driver), granularity(context.driver)
    sizes = QUICK if context.quick else Sizes()
    with compute.on():
        for debug in ((), ("skip_loads",)):
            with opened(sizes, unit, context.driver, debug) as engine:
                if not prepared(context, engine):
                    return
                model = CapturedModel(engine, compute, sizes.layer, sizes.requests, sizes.most)
                steps = Steps(engine, compute, model, sizes, cuda_capture(model, compute))
                if debug:
                    check_control(context, steps)
                else:
                    check_rounds(context, steps)
                    measure(context, steps, unit)
                compute.synchronize()
                model.close()


def opened(sizes: Sizes, unit: int, driver: str, debug: tuple[str, ...]) -> TransferEngine:
    """An engine with rows for two sets of loads, and for stores."""
    resident, rows = 1 + WRITTEN + PROMOTED, 2 * sizes.most + 4 * WRITTEN
    geometry = shape(sizes.layers, sizes.page, resident, sizes.most, sizes.slots, rows, unit)
    return TransferEngine(geometry, driver=driver, debug=debug)


def prepared(context: Context, engine: TransferEngine, images: Images = gather_image) -> bool:
    """Whether the engine has its kernel; notes why not."""
    arch, pieces = device_arch(engine), engine.geometry.pooled_blocks
    for ahead in (True, False):
        found = images(arch, ahead=ahead)
        if not isinstance(found, GatherImage):
            context.report.note(f"engine: no gather kernel: {found.reason}")
            return False
        try:
            engine.graphs.prepare(found.image, pieces)
        except PieError as error:
            context.report.note(f"engine: gather kernel, compiled {found.origin}: {error}")
            continue
        return True
    return False


class Steps:
    """Numbered steps of a captured model.

    Attributes:
        wrong_pages: resident or stored pages that held other bytes, so far, and pages that a
            step without a plan copied to.
        in_graph: steps with a plan that ran in the graph.
    """

    def __init__(
        self,
        engine: TransferEngine,
        compute: Compute,
        model: CapturedModel,
        sizes: Sizes,
        capture: Capture,
    ) -> None:
        """Capture the graph."""
        self.engine, self.compute, self.model, self.sizes = engine, compute, model, sizes
        self.wrong_pages = self.in_graph = 0
        self._number = 0
        self._capture, self._has_bare = capture, False
        model.capture(capture)

    def plan(self, loads: int, first: int, kind: str = "") -> StepPlan:
        """Loads of rows from the first on, in runs of up to 16.

        Args:
            loads: how many.
            first: row.
            kind: "store" or "promote" also some blocks.
        """
        self._number += 1
        geometry = self.engine.geometry
        block = geometry.resident_blocks
        loaded = [Copy(block + at, first + at, min(16, loads - at)) for at in range(0, loads, 16)]
        stores: list[Copy] = []
        promotions: list[Copy] = []
        if kind == "store":
            stores = [Copy(1, 2 * self.sizes.most + WRITTEN * (self._number % 4), WRITTEN)]
        if kind == "promote":
            promotions = [Copy(1 + WRITTEN, first + loads, PROMOTED)]
        chunk = geometry.chunk_rows
        out, home, ring = (runs(in_chunks(each, chunk)) for each in (stores, promotions, loaded))
        return StepPlan(self._number, out, home, ring, (), forward=True)

    def step(self, loads: int, first: int, kind: str = "", in_graph: bool = True) -> None:
        """One step; what it stored or promoted is looked at when it is over."""
        model, plan = self.model, self.plan(loads, first, kind)
        model.set_inputs(plan.step, torch.arange(first, first + loads))
        self.in_graph += model.run(plan, in_graph)
        if kind:
            self.engine.drain()
            self.compute.synchronize()
            self.wrong_pages += model.wrong_promotions(plan.promotions)
            self.wrong_pages += model.wrong_stores(plan.stores, plan.step)

    def bare(self) -> None:
        """A graph without copies, captured when it is first asked for."""
        if not self._has_bare:
            self.model.capture_bare(self._capture)
            self._has_bare = True
        self._number += 1
        self.model.set_inputs(self._number, torch.arange(0))
        self.model.replay_bare()

    def without_plan(self) -> None:
        """The graph alone; no step is open, and its word is the one that follows."""
        self._number += 1
        self.model.set_inputs(self._number, torch.arange(0))
        self.model.replay()

    def seconds(self, step: Callable[[int], None]) -> float:
        """Of a step: a mean over a run of them."""
        start = self.compute.mark()
        for index in range(self.sizes.steps):
            step(index)
        return self.compute.seconds(start, self.compute.mark()) / self.sizes.steps


def rounds(steps: Steps, count: int) -> None:
    """So many steps, each with another plan than the one before; those without copy nothing."""
    most = steps.sizes.most
    kinds = itertools.cycle(("", "store", "", "promote", "", "none"))
    steps.step(0, 0)  # What the first of the others stores was written by a step.
    for index, kind in zip(range(count), kinds, strict=False):
        loads = 1 + (7 * index) % (most - PROMOTED)
        if kind == "none":
            steps.model.spoil()
            steps.without_plan()
            steps.compute.synchronize()
            steps.wrong_pages += steps.model.wrong_spoilt()
        else:
            steps.step(loads, (index * 13) % most, kind)


def check_rounds(context: Context, steps: Steps) -> None:
    """All pages as they should be."""
    rounds(steps, steps.sizes.rounds)
    steps.engine.drain()
    steps.compute.synchronize()
    wrong, report = int(steps.model.wrong), context.report
    report.row("engine: steps in a graph", rounds=steps.sizes.rounds, in_graph=steps.in_graph)
    report.check("engine: steps that ran in the graph", steps.in_graph, "> 0", steps.in_graph > 0)
    report.check("engine: ring pages that held other bytes", wrong, "0", wrong == 0)
    wrong = steps.wrong_pages
    name = "engine: stored or promoted pages with other bytes, or copied to without a plan"
    report.check(name, wrong, "0", wrong == 0)


def check_control(context: Context, steps: Steps) -> None:
    """The checks must see copies that are left out."""
    rounds(steps, 12)
    steps.compute.synchronize()
    wrong = int(steps.model.wrong)
    context.report.check("engine: pages found wrong with skip_loads", wrong, "> 0", wrong > 0)


def measure_idle(context: Context, steps: Steps) -> float:
    """Seconds of the graph with copies that copies nothing, beside one that holds none."""
    steps.bare()
    alone, bare = [], []
    for _ in range(max(3, steps.sizes.turns)):
        alone.append(steps.seconds(lambda _: steps.without_plan()))
        bare.append(steps.seconds(lambda _: steps.bare()))
    ratio = middle([a / b for a, b in zip(alone, bare, strict=True)])
    context.report.row(
        "engine: idle steps, a graph with copies beside one without",
        layers=steps.sizes.layers,
        with_copies_ms=1e3 * middle(alone),
        without_ms=1e3 * middle(bare),
        ratio=ratio,
    )
    name = "engine: idle step in a graph with copies beside one without"
    context.report.check(name, ratio, f"<= {IDLE}", ratio <= IDLE, target=True)
    return middle(alone)


def measure(context: Context, steps: Steps, unit: int) -> None:
    """Steps that load, in the graph and by gates, beside the graph alone."""
    sizes = steps.sizes
    link = measure_link(sizes.layers, sizes.page, granularity=unit, driver=context.driver).load
    alone = measure_idle(context, steps)
    for share in SHARES:
        if not context.has_time(10, f"engine: {share:g} of the link and more"):
            return
        wanted = int(share * link * alone / steps.engine.geometry.row_bytes)
        loads = max(1, min(sizes.most - PROMOTED, wanted))

        def step(index: int, in_graph: bool, loads: int = loads) -> None:
            steps.step(loads, sizes.most * (index % 2), in_graph=in_graph)

        ways: dict[str, Callable[[int], None]] = {
            "alone": lambda _: steps.without_plan(),
            "graph": lambda index: step(index, True),
            "gates": lambda index: step(index, False),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(sizes.turns):
            for name, way in ways.items():
                found[name].append(steps.seconds(way))
        context.report.row(
            "engine: steps that load, beside the graph without loads",
            share_of_link=share,
            blocks=loads,
            graph_alone_ms=1e3 * middle(found["alone"]),
            **{
                key: middle([a / b for a, b in zip(found[name], found["alone"], strict=True)])
                for name, key in (("graph", "in_graph_ratio"), ("gates", "by_gates_ratio"))
            },
        )

"""Random plans whose steps run in a graph, piecewise, or without a plan, in any order."""

from __future__ import annotations

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import StepPlan
from tests.engine.driving import inject
from tests.engine.graphing import GraphModel
from tests.engine.test_random_plans import Holds, Runner, random_geometry
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.standin import load

pytestmark = pytest.mark.usefixtures("kernel")


class GraphRunner(Runner):
    """Half of its steps are replays; a fifth of the plans have too many runs for one."""

    def __init__(self, engine: TransferEngine, seed: int) -> None:
        super().__init__(engine, seed, inline=False, runs=3)
        assert self.stream is not None
        engine.graphs.prepare(IMAGE, 4, 1 + seed % 12)
        self.graph = GraphModel(engine, self.stream)
        self.entered = self.refused = 0

    def unplanned(self, writes: Holds) -> None:
        if self.model.draw.random() < 0.5:
            self.graph.launch(self.compute(writes, True))
        else:
            super().unplanned(writes)

    def planned(
        self, plan: StepPlan, writes: Holds, reads: Holds, compute: int, abort: bool
    ) -> bool:
        draw = self.model.draw.random
        wanted = draw() < 0.7
        fits = self.engine.begin_step(plan, compute, graph=wanted)
        self.ahead()
        self.refused += wanted and not fits
        if not fits or draw() < 0.2:
            self.pass_gates(writes, reads, abort)
            return not abort
        if abort and draw() < 0.2:
            return False
        self.engine.graphs.enter()
        if abort and draw() < 0.5:
            return False
        self.graph.launch(self.compute(writes, True), self.compute(reads, False))
        self.entered += 1
        return not abort

    def ahead(self) -> None:
        """What runs ahead of the first layer."""

    def finish(self) -> None:
        super().finish()
        self.graph.close()


@pytest.mark.parametrize("fault", ["none", "late", "torn"])
@pytest.mark.parametrize("own_addresses", [False, True])
def test_every_page_holds_what_the_model_says(
    driver: str, kernel: GatherKernel, fault: str, own_addresses: bool
) -> None:
    """The stand-in finds no access out of order, and no table that changes under a replay."""
    load().set(can_use_host_pointer=int(not own_addresses))
    entered = refused = 0
    for seed in range(200, 212):
        with TransferEngine(random_geometry(seed), driver=driver) as engine:
            runner = GraphRunner(engine, seed)
            late = {"milliseconds": 0.1, "up_to": 0.6} if fault != "none" else {}
            inject(engine, fault, direction=("load", "store", "both")[seed % 3], seed=seed, **late)
            kernel.wait(0.3 * (seed % 2) if fault == "late" else 0)
            for _ in range(25):
                runner.step()
            runner.finish()
            entered += runner.entered
            refused += runner.refused
            kernel.wait(0)
    assert entered > 60
    assert refused > 10

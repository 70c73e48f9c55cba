"""Random plans as in ``test_graph_random.py``, with blocks that layers without gates use."""

from __future__ import annotations

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import StepPlan
from tests.engine.driving import inject
from tests.engine.graphs.test_graph_random import GraphRunner
from tests.engine.test_random_plans import Holds, Model, random_geometry

pytestmark = pytest.mark.usefixtures("kernel")
THEIRS = -1
"""What a resident block holds for the layers with gates when it is another group's."""


def blocks_of(runs: list[list[int]]) -> set[int]:
    return {block + i for block, _, count in runs for i in range(count)}


class GroupModel(Model):
    """Blocks go from the layers with gates to those without, and back.

    Attributes:
        windows: contents of the blocks of layers without gates.
        ungated: blocks that these used since the layers with gates passed last.
    """

    windows: Holds
    ungated: set[int]

    def plan(self, idle: bool) -> tuple[StepPlan, set[int]]:
        for block in [block for block in self.windows if self.draw.random() < 0.3]:
            del self.windows[block]
            self.resident[block] = 0
        step, promoted = super().plan(idle)
        return step._replace(after_all=bool(promoted & self.ungated)), promoted

    def claim(self, step: StepPlan) -> tuple[StepPlan, Holds]:
        """The plan of a step that runs the model, and what layers without gates write."""
        promoted, stored = blocks_of(step.promotions.tolist()), blocks_of(step.stores.tolist())
        free = [b for b, tag in enumerate(self.resident) if not tag and b not in promoted]
        claimed = [b for b in free if self.draw.random() < 0.6]
        writes = self.write_windows([*self.windows, *claimed])
        return step._replace(stores_first=not stored.isdisjoint(claimed)), writes

    def write_windows(self, blocks: list[int]) -> Holds:
        written: Holds = {}
        for block in blocks:
            self.tag += 1
            self.windows[block] = written[block] = self.tag
            self.resident[block] = THEIRS
        return written

    def writes(self, but: set[int]) -> Holds:
        return super().writes(but | self.windows.keys())

    def reads(self) -> Holds:
        known = {block: tag for block, tag in super().reads().items() if tag != THEIRS}
        return {**known, **self.windows}


class GroupRunner(GraphRunner):
    """Layers without gates write ahead of the first gate or the replay, and after the last.

    Args:
        lacking: name of the flag that no plan has.
    """

    def __init__(self, engine: TransferEngine, seed: int, lacking: str = "") -> None:
        super().__init__(engine, seed)
        self.model = model = GroupModel(engine.geometry, seed)
        model.windows, model.ungated = {}, set()
        self.groups = model
        self.lacking = lacking
        self.flags = {"stores_first": 0, "after_all": 0}
        self._ahead: Holds = {}

    def step(self) -> None:
        if self.model.draw.random() < 0.5:
            self._write(self.groups.write_windows([*self.groups.windows]))
            self.groups.ungated |= self.groups.windows.keys()
        super().step()

    def unplanned(self, writes: Holds) -> None:
        super().unplanned(writes)
        self.groups.ungated.clear()

    def planned(
        self, plan: StepPlan, writes: Holds, reads: Holds, compute: int, abort: bool
    ) -> bool:
        plan, self._ahead = self.groups.claim(plan)
        for flag in self.flags:
            self.flags[flag] += getattr(plan, flag)
        if self.lacking:
            plan = plan._replace(**{self.lacking: False})
        reads.update(self.groups.windows)
        done = super().planned(plan, writes, reads, compute, abort)
        self.groups.ungated = set(self.groups.windows) if done else set()
        return done

    def ahead(self) -> None:
        self._write(self._ahead)

    def _write(self, pages: Holds) -> None:
        for layer in range(self.engine.geometry.num_layers):
            self._launch(layer, pages, True)

    def finish(self) -> None:
        assert self.stream
        self.stream.synchronize()
        for block, tag in self.groups.windows.items():
            assert all(
                self.view.holds(i, block, tag) for i in range(self.engine.geometry.num_layers)
            )
            self.model.resident[block] = 0
        super().finish()


def play(seed: int, driver: str, lacking: str = "") -> dict[str, int]:
    """Run some steps; returns how many plans had which flag."""
    with TransferEngine(random_geometry(seed), driver=driver) as engine:
        runner = GroupRunner(engine, seed, lacking)
        late = {"milliseconds": 0.1, "up_to": 0.6}
        inject(engine, "late", direction=("load", "store", "both")[seed % 3], seed=seed, **late)
        try:
            for _ in range(25):
                runner.step()
            runner.finish()
        finally:
            if runner.graph.executable:
                runner.graph.close()
        return {**runner.flags, "entered": runner.entered}


def test_every_page_holds_what_the_model_says(driver: str) -> None:
    total = {"stores_first": 0, "after_all": 0, "entered": 0}
    for seed in range(300, 324):
        for name, count in play(seed, driver).items():
            total[name] += count
    assert min(total.values()) > 25


@pytest.mark.parametrize("lacking", ["stores_first", "after_all"])
def test_a_flag_that_plans_lack_is_found(driver: str, lacking: str) -> None:
    for seed in range(300, 340):
        try:
            play(seed, driver, lacking)
        except AssertionError:
            return
    pytest.fail("forty seeds did not notice")

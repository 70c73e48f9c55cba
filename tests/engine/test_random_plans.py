"""Random plans against a model of what every page must hold."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pie_vllm.engine.step_stats import StepStats
from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Copy, StepPlan, num_copied, runs
from tests.engine.driving import PAGE, View, inject
from tests.helpers.streams import DriverStream

Holds = dict[int, int]


class Model:
    """Contents of resident blocks and rows (0: not known), and plans that fit them."""

    def __init__(self, geometry: Geometry, seed: int, runs: int = 3) -> None:
        self.runs = runs
        self.g = geometry
        self.draw = random.Random(seed)
        self.resident = [0] * geometry.resident_blocks
        self.rows = [0] * geometry.rows
        self.loads: list[Copy] = []
        self.tag = 0
        self.step = 0
        self.planned = 0

    def _run(
        self,
        low: int,
        high: int,
        block_ok: Callable[[int], bool],
        row_ok: Callable[[int], bool],
    ) -> Copy | None:
        block, row = self.draw.randrange(low, high), self.draw.randrange(self.g.rows)
        edge = min(self.g.rows, (row // self.g.chunk_rows + 1) * self.g.chunk_rows)
        most, count = self.draw.randint(1, 3), 0
        while (
            count < most
            and block + count < high
            and row + count < edge
            and block_ok(block + count)
            and row_ok(row + count)
        ):
            count += 1
        return Copy(block, row, count) if count else None

    def plan(self, idle: bool) -> tuple[StepPlan, set[int]]:
        """A plan, and the blocks it promotes; the model holds what follows from it."""
        self.step += 1
        draw, r = self.draw, self.g.resident_blocks
        self.rows = [0 if draw.random() < 0.15 else tag for tag in self.rows]
        stores, promotions, loads = [], [], []
        stored: set[int] = set()
        promoted: set[int] = set()
        for _ in range(self.runs):
            run = self._run(0, r, lambda b: self.resident[b] > 0, lambda row: not self.rows[row])
            if run:
                stores.append(run)
                for i in range(run[2]):
                    self.rows[run.row + i] = self.resident[run.block + i]
                    stored.add(run.row + i)
                    if draw.random() < 0.7:
                        self.resident[run.block + i] = 0
        for _ in range(self.runs - 1):
            run = self._run(
                0,
                r,
                lambda b: not self.resident[b],
                lambda row: self.rows[row] > 0 and row not in stored,
            )
            if run:
                promotions.append(run)
                for i in range(run[2]):
                    self.resident[run.block + i] = self.rows[run.row + i]
                    promoted.add(run.block + i)
        used: set[int] = set()
        known = all(self.rows[c.row + i] for c in self.loads for i in range(c[2]))
        same = self.planned + 1 == self.step and known and draw.random() < 0.4
        self.planned = self.step
        if not same:
            for _ in range(self.runs):
                run = self._run(
                    r,
                    self.g.num_blocks,
                    lambda b: b not in used,
                    lambda row: self.rows[row] > 0,
                )
                if run:
                    loads.append(run)
                    used.update(range(run.block, run.block + run[2]))
            self.loads = loads
        wanted = None if same else runs(loads)
        step = StepPlan(self.step, runs(stores), runs(promotions), wanted, (), not idle)
        return step, promoted

    def writes(self, but: set[int]) -> Holds:
        """New contents of some resident blocks."""
        result = {}
        for block in range(self.g.resident_blocks):
            if block not in but and self.draw.random() < 0.4:
                self.tag += 1
                self.resident[block] = result[block] = self.tag
        return result

    def reads(self) -> Holds:
        """What attention must find: all resident blocks that are known, and the loads."""
        result = {block: tag for block, tag in enumerate(self.resident) if tag}
        for run in self.loads:
            result.update({run.block + i: self.rows[run.row + i] for i in range(run[2])})
        return result


def implied_bytes(plan: StepPlan, loads: list[Copy], row_bytes: int) -> tuple[int, int, int]:
    """Bytes loaded, stored and promoted."""
    promoted = num_copied(plan.promotions)
    loaded = sum(run[2] for run in loads) if plan.forward else 0
    stored = num_copied(plan.stores)
    return (promoted + loaded) * row_bytes, stored * row_bytes, promoted * row_bytes


def random_geometry(seed: int) -> Geometry:
    draw = random.Random(seed)
    layers, rows = draw.randint(1, 6), draw.randint(2, 13)
    return Geometry(
        num_layers=layers,
        page_bytes=draw.randint(40, 3000),
        resident_blocks=draw.randint(3, 10),
        pooled_blocks=draw.randint(1, 6),
        ring_slots=draw.randint(1, layers),
        rows=rows,
        chunk_rows=draw.randint(1, rows),
        granularity=PAGE,
    )


class Runner:
    """Runs random steps; the compute writes and checks pages, in place or on a stream."""

    def __init__(self, engine: TransferEngine, seed: int, inline: bool, runs: int = 3) -> None:
        self.engine, self.view = engine, View(engine)
        self.model = Model(engine.geometry, seed, runs)
        self.stream = None if inline else DriverStream(engine)
        self.wrong: list[tuple[int, int, int, int]] = []
        self.moved = [0, 0]

    def compute(self, pages: Holds, write: bool) -> Callable[[int], None]:
        """What this step's model does in a layer: writes pages, or checks them."""
        step = self.model.step

        def body(layer: int) -> None:
            for block, tag in pages.items():
                if write:
                    self.view.write(layer, block, tag)
                elif not self.view.holds(layer, block, tag):
                    self.wrong.append((step, layer, block, tag))

        return body

    def _launch(self, layer: int, pages: Holds, write: bool) -> None:
        body = self.compute(pages, write)
        if self.stream is None:
            body(layer)
        else:
            self.stream.launch(lambda: body(layer))

    def _count(self, plan: StepPlan, stats: StepStats) -> None:
        loaded, stored, promoted = implied_bytes(
            plan, self.model.loads, self.engine.geometry.row_bytes
        )
        assert stats.step == plan.step
        assert (stats.bytes_loaded, stats.bytes_stored) == (loaded, stored)
        assert stats.bytes_promoted == promoted
        self.moved[0] += loaded
        self.moved[1] += stored

    def step(self) -> None:
        kind = self.model.draw.randrange(10)
        if kind == 0:
            self.model.step += 1
            self.unplanned(self.model.writes(set()))
            return
        compute = self.stream.id if self.stream else 0
        plan, promoted = self.model.plan(idle=kind == 1)
        if kind == 1:
            self._count(plan, self.engine.run_idle(plan, compute))
            return
        writes = self.model.writes(promoted)
        if self.planned(plan, writes, self.model.reads(), compute, abort=kind == 2):
            stats = self.engine.end_step()
            assert stats.gates == self.engine.geometry.num_layers
            self._count(plan, stats)
        else:
            self.engine.abort_step()
            for block in writes:
                self.model.resident[block] = 0

    def unplanned(self, writes: Holds) -> None:
        """A step without a plan."""
        for layer in range(self.engine.geometry.num_layers):
            self._launch(layer, writes, True)

    def planned(
        self, plan: StepPlan, writes: Holds, reads: Holds, compute: int, abort: bool
    ) -> bool:
        """A gated step, up to its end or to where it is given up; whether it came to its end."""
        self.engine.submit_head_first(plan.step % 4 != 3)
        self.engine.begin_step(plan, compute)
        self.pass_gates(writes, reads, abort)
        return not abort

    def pass_gates(self, writes: Holds, reads: Holds, abort: bool) -> None:
        """The layers, or some of them."""
        layers = range(self.engine.geometry.num_layers)
        stop = self.model.draw.choice(layers) if abort else -1
        for layer in layers:
            if layer == stop:
                break
            self.engine.before_write(layer)
            self._launch(layer, writes, True)
            self.engine.before_attention(layer)
            self._launch(layer, reads, False)
            self.engine.after_attention(layer)

    def finish(self) -> None:
        if self.stream:
            self.stream.synchronize()
        self.engine.abort_step()
        assert self.wrong == []
        for layer in range(self.engine.geometry.num_layers):
            for block, tag in enumerate(self.model.resident):
                assert not tag or self.view.holds(layer, block, tag)
            for row, tag in enumerate(self.model.rows):
                assert not tag or self.view.row_holds(row, layer, tag)


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "async"])
@pytest.mark.parametrize("fault", ["none", "late", "torn"])
def test_every_page_holds_what_the_model_says(driver: str, inline: bool, fault: str) -> None:
    for seed in range(8):
        with TransferEngine(
            random_geometry(seed), driver=driver, debug=("poison",) * (seed % 2)
        ) as engine:
            runner = Runner(engine, seed, inline)
            late = {"milliseconds": 0.1, "up_to": 0.6} if fault != "none" else {}
            direction = ("load", "store", "both")[seed % 3]
            inject(engine, fault, direction=direction, seed=seed, **late)
            for _ in range(20):
                runner.step()
            runner.finish()


def test_counters_are_what_the_plans_imply(driver: str) -> None:
    for seed in range(100, 104):
        with TransferEngine(random_geometry(seed), driver=driver) as engine:
            runner = Runner(engine, seed, inline=False)
            runner.model.draw.randrange = _without_aborts(runner.model.draw)  # type: ignore[method-assign]
            for _ in range(20):
                runner.step()
            runner.finish()
            assert counters(engine, "load").bytes == runner.moved[0] > 0
            assert counters(engine, "store").bytes == runner.moved[1] > 0


def _without_aborts(draw: random.Random) -> Callable[..., int]:
    randrange = draw.randrange

    def chosen(*limits: int) -> int:
        value = randrange(*limits)
        return 5 if limits == (10,) and value == 2 else value

    return chosen

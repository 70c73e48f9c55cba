"""Tags in the KV pages of a real transfer engine, computed on an asynchronous stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.engine.step_stats import StepStats
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import PoolOrder, PoolState, StepPlan, num_copied
from tests.helpers.streams import DriverEvent, DriverStream
from tests.helpers.tagrunner import Work, check, check_free

LAYER_TAG = 1 << 40


class EngineMemory:
    """A made-up model on a compute stream of its own, over the engine's arena.

    Each layer of a step is two pieces of work on the stream, as in vLLM: write
    the new tokens' tags, then read all pages of the context and check them.
    ``run`` only submits; what is checked is checked when the stream gets there,
    with copies of this and the next step under way on the engine's streams.

    Groups without a pool have a layer in every region, which no gate is around: those of even
    regions run ahead of the layers with gates, the others after them. States are read, and new
    blocks zeroed, ahead of all. Draft layers write and read the same blocks once the step is over.
    """

    def __init__(self, engine: TransferEngine, block_size: int) -> None:
        self.engine = engine
        self.keeper = PoolKeeper(engine, engine.geometry.chunk_rows, idle_seconds=60)
        geometry = engine.geometry
        base = np.frombuffer(engine.arena.buffer(), dtype=np.int8)
        self.layers: list[np.ndarray] = []
        for layer in range(geometry.num_regions):
            start = geometry.page_offset(layer, 0)
            end = geometry.page_offset(layer, geometry.num_blocks)
            pages = base[start:end].reshape(geometry.num_blocks, geometry.page_bytes)
            self.layers.append(pages[:, : 8 * block_size].view(np.int64))
        self.compute = DriverStream(engine)
        self.done: list[DriverEvent] = []
        self.errors: list[BaseException] = []
        self.stats: list[StepStats] = []
        self.pages_loaded = 0
        self.pages_stored = 0
        self._loads = 0

    def run(self, plan: StepPlan | None, work: Work) -> None:
        """Submit one step; returns before it is computed."""
        engine = self.engine
        if plan is not None:
            self._expect(plan)
            self.keeper.prepare(plan.stores, plan.promotions, plan.loads)
        if plan is None or not plan.forward:
            if plan is not None:
                self.stats.append(engine.run_idle(plan, self.compute.id))
            self._compute(work, gates=False)
        else:
            engine.begin_step(plan, self.compute.id)
            self._compute(work, gates=True)
            self.stats.append(engine.end_step())
        layers = engine.geometry.num_layers
        for layer in range(layers, layers + engine.geometry.draft_layers):
            self._layer(layer, work, gates=False)
        event = DriverEvent(engine)
        event.record(self.compute)
        self.done.append(event)

    def hold(self, order: PoolOrder) -> None:
        """Follow the order of the step submitted last."""
        self.keeper.follow(order)

    @property
    def state(self) -> PoolState:
        """What the pool holds."""
        return self.keeper.state

    def _expect(self, plan: StepPlan) -> None:
        if plan.loads is not None:
            self._loads = num_copied(plan.loads)
        self.pages_stored += num_copied(plan.stores)
        self.pages_loaded += num_copied(plan.promotions)
        self.pages_loaded += self._loads if plan.forward else 0

    def _compute(self, work: Work, *, gates: bool) -> None:
        geometry = self.engine.geometry
        regions = range(geometry.num_regions if work.free_writes or work.zeroed else 0)
        for region in regions:
            self._launch(self._ahead, region, work)
        for region in regions[::2]:
            self._launch(self._free, region, work)
        for layer in range(geometry.num_layers):
            self._layer(layer, work, gates=gates)
        for region in regions[1::2]:
            self._launch(self._free, region, work)

    def _layer(self, layer: int, work: Work, *, gates: bool) -> None:
        if gates:
            self.engine.before_write(layer)
        self._launch(self._write, layer, work)
        if gates:
            self.engine.before_attention(layer)
        self._launch(self._check, layer, work)
        if gates:
            self.engine.after_attention(layer)

    def _launch(self, function: Any, layer: int, work: Work) -> None:
        def call() -> None:
            try:
                function(layer, work)
            except BaseException as error:
                self.errors.append(error)

        self.compute.launch(call)

    def _write(self, layer: int, work: Work) -> None:
        pages = self.layers[layer]
        for block, slot, tag in work.writes:
            pages[block, slot] = tag + layer * LAYER_TAG

    def _ahead(self, region: int, work: Work) -> None:
        pages = self.layers[region]
        check_free(work.free_before, pages, region * LAYER_TAG)
        pages[work.zeroed] = 0

    def _free(self, region: int, work: Work) -> None:
        pages = self.layers[region]
        for block, slot, tag in work.free_writes:
            pages[block, slot] = tag + region * LAYER_TAG
        check_free(work.free_reads, pages, region * LAYER_TAG)

    def _check(self, layer: int, work: Work) -> None:
        check(work, self.layers[layer], layer * LAYER_TAG)

    def finish(self, step: int) -> None:
        """Wait for a step's compute and raise what it found."""
        self.done[step].synchronize()
        if self.errors:
            raise self.errors[0]

    def close(self) -> None:
        """Drain and close."""
        self.compute.synchronize()
        self.keeper.close()
        for event in self.done:
            event.close()
        self.compute.close()
        self.layers.clear()

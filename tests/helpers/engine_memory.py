"""Tags in the KV pages of a real transfer engine, computed on an asynchronous stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.engine.step_stats import StepStats
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import PoolOrder, PoolState, StepPlan, num_copied
from tests.helpers.streams import DriverEvent, DriverStream
from tests.helpers.tagrunner import Work, check

LAYER_TAG = 1 << 40


class EngineMemory:
    """A made-up model on a compute stream of its own, over the engine's arena.

    Each layer of a step is two pieces of work on the stream, as in vLLM: write
    the new tokens' tags, then read all pages of the context and check them.
    ``run`` only submits; what is checked is checked when the stream gets there,
    with copies of this and the next step under way on the engine's streams.
    """

    def __init__(self, engine: TransferEngine, block_size: int) -> None:
        self.engine = engine
        self.keeper = PoolKeeper(engine, engine.geometry.chunk_rows, idle_seconds=60)
        geometry = engine.geometry
        base = np.frombuffer(engine.arena.buffer(), dtype=np.int8)
        self.layers: list[np.ndarray] = []
        for layer in range(geometry.num_layers):
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
            for layer in range(engine.geometry.num_layers):
                self._launch(self._write, layer, work)
                self._launch(self._check, layer, work)
        else:
            engine.begin_step(plan, self.compute.id)
            for layer in range(engine.geometry.num_layers):
                engine.before_write(layer)
                self._launch(self._write, layer, work)
                engine.before_attention(layer)
                self._launch(self._check, layer, work)
                engine.after_attention(layer)
            self.stats.append(engine.end_step())
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

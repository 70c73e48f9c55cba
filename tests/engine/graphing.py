"""A model captured in a CUDA graph of the stand-in, whose replays run what each launch brings."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Any

from pie_vllm.engine.step_stats import StepStats
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import StepPlan
from tests.engine.driving import View
from tests.engine.standin_fixtures import GLOBAL, HOST_FN
from tests.helpers.cuda_calls import Cuda
from tests.helpers.standin import load
from tests.helpers.streams import DriverStream

Body = Callable[[int], Any] | None
LAYERS = range(6)
PIECES = 4
"""Pieces that tables of these tests hold."""


class GraphModel:
    """One captured pass through all layers, with the engine's copies in it.

    The capture says which pages the compute reads and writes, so that the stand-in finds
    whatever is not ordered with them at a replay.
    """

    def __init__(
        self,
        engine: TransferEngine,
        stream: DriverStream,
        *,
        written: tuple[int, ...] = (),
        gates: Callable[[int], None] | None = None,
    ) -> None:
        """Capture it.

        Args:
            engine: after ``graphs.prepare``.
            stream: that the model runs on.
            written: resident blocks that every replay may write.
            gates: all that a layer does between its write and the end of its attention, in
                place of the gates, for captures that miss some.
        """
        self.engine, self.stream, self.written = engine, stream, written
        self.cuda = Cuda(load())
        self.steps: deque[tuple[Body, Body]] = deque()
        self._now: tuple[Body, Body] = (None, None)
        self._callbacks: list[Any] = []
        self.executable = 0
        self.cuda.do("cuStreamBeginCapture", stream.id, GLOBAL)
        graph = ctypes.c_uint64()
        try:
            engine.graphs.begin_capture(stream.id)
            try:
                self._host(self._begin)
                for layer in range(engine.geometry.num_layers):
                    (gates or self.layer)(layer)
            finally:
                engine.graphs.end_capture()
        finally:
            code = self.cuda.result("cuStreamEndCapture", stream.id, ctypes.byref(graph))
            if code == 0:
                self.executable = self.cuda.make("cuGraphInstantiateWithFlags", graph.value, 0)
                self.cuda.do("cuGraphDestroy", graph.value)
            self.code = code

    def layer(self, layer: int) -> None:
        """One layer with its gates."""
        engine = self.engine
        engine.before_write(layer)
        self.write(layer)
        engine.before_attention(layer)
        self.attend(layer)
        engine.after_attention(layer)

    def write(self, layer: int) -> None:
        """Its KV write."""
        self._host(lambda: self._run(0, layer))
        for block in self.written:
            self._access(layer, block, 1, write=True)

    def attend(self, layer: int) -> None:
        """Its attention, which reads all blocks."""
        self._host(lambda: self._run(1, layer))
        self._access(layer, 0, self.engine.geometry.num_blocks, write=False)

    def launch(self, write: Body = None, attend: Body = None) -> None:
        """A replay on the stream, with this compute."""
        self.steps.append((write, attend))
        self.cuda.do("cuGraphLaunch", self.executable, self.stream.id)

    def run(self, step: StepPlan, write: Body = None, attend: Body = None) -> StepStats:
        """A step of the plan in this graph; it must fit."""
        assert self.engine.begin_step(step, self.stream.id, graph=True)
        self.engine.graphs.enter()
        self.launch(write, attend)
        return self.engine.end_step()

    def close(self) -> None:
        """Once no replay is under way; again is fine."""
        if self.executable:
            self.cuda.result("cuStreamSynchronize", self.stream.id)
            self.cuda.result("cuGraphExecDestroy", self.executable)
        self.executable = 0

    def _host(self, body: Callable[[], object]) -> None:
        callback = HOST_FN(lambda _: (body(), None)[1])
        self._callbacks.append(callback)
        self.cuda.do("cuLaunchHostFunc", self.stream.id, callback, None)

    def _begin(self) -> None:
        self._now = self.steps.popleft()

    def _run(self, which: int, layer: int) -> None:
        body = self._now[which]
        if body is not None:
            body(layer)

    def _access(self, layer: int, block: int, blocks: int, *, write: bool) -> None:
        geometry = self.engine.geometry
        address = self.engine.arena.address + geometry.page_offset(layer, block)
        size = blocks * geometry.page_bytes
        assert load().access(self.stream.id, address, size, write=write) == 0


class Seen:
    """Layers whose attention ran, and those that did not find what blocks must hold."""

    def __init__(self, view: View, **holds: int) -> None:
        self.view = view
        self.holds = {int(block[1:]): tag for block, tag in holds.items()}
        self.layers: list[int] = []
        self.wrong: list[tuple[int, int]] = []

    def __call__(self, layer: int) -> None:
        self.layers.append(layer)
        self.wrong += [
            (layer, block)
            for block, tag in self.holds.items()
            if not self.view.holds(layer, block, tag)
        ]

    def check(self) -> None:
        assert (self.wrong, self.layers) == ([], list(LAYERS))

"""A decode step over an engine's arena as one CUDA graph, copies inside; its inputs change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.gpu.harness.compute import Compute, layer_views
from benchmarks.gpu.harness.decode import WRITTEN, LayerShape, Model, word
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import Runs, StepPlan

SPOILT = -1
"""In no row and no page otherwise."""


class Graph(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Launch it on the compute stream."""


Capture = Callable[[Callable[[], None]], Graph]
"""Runs a function, and makes a graph of what it submits."""


class CapturedModel(Model):
    """The model of ``decode.py``; a step of it can be a graph.

    What differs between steps lies in tensors, as vLLM's inputs do: which rows the ring pages must
    hold, and the word that the KV write writes.

    Args:
        engine: over whose arena; after ``graphs.prepare``.
        compute: where.
        shape: of a layer.
        requests: of the step.
        most: ring pages of a layer that attention reads.
    """

    def __init__(
        self, engine: TransferEngine, compute: Compute, shape: LayerShape, requests: int, most: int
    ) -> None:
        super().__init__(engine, compute, shape, requests)
        device = compute.device
        self._rows = torch.zeros(most, dtype=torch.int64, device=device)
        self._loaded = torch.zeros(most, dtype=torch.bool, device=device)
        self._word = torch.zeros((), dtype=torch.int64, device=device)
        self._graph: Graph | None = None
        self._bare: Graph | None = None

    def capture(self, capture: Capture) -> None:
        """Capture a step, gates and copies in it."""
        engine, stream = self._engine, self._compute.stream

        def body() -> None:
            engine.graphs.begin_capture(stream)
            self._forward(gates=True)
            engine.graphs.end_capture()

        self._graph = capture(body)

    def capture_bare(self, capture: Capture) -> None:
        """Capture a step without gates and copies, as of vLLM without pie."""
        self._bare = capture(lambda: self._forward(gates=False))

    def replay_bare(self) -> None:
        """That graph alone."""
        assert self._bare is not None
        self._bare.replay()

    def set_inputs(self, step: int, rows: torch.Tensor) -> None:
        """Of the step that comes next.

        Args:
            step: its number.
            rows: what the ring blocks from the first on must hold; no others are looked at.
        """
        count = len(rows)
        self._rows[:count].copy_(rows, non_blocking=True)
        self._loaded.fill_(False)
        self._loaded[:count] = True
        self._word.fill_(word(step, 0))

    def run(self, plan: StepPlan, in_graph: bool = True) -> bool:
        """A step with its copies; returns whether it ran in the graph, where it may."""
        engine = self._engine
        fits = engine.begin_step(plan, self._compute.stream, graph=in_graph)
        if fits:
            engine.graphs.enter()
            self.replay()
        else:
            self._forward(gates=True)
        engine.end_step()
        return fits

    def replay(self) -> None:
        """The graph alone, as of a step without a plan."""
        assert self._graph is not None
        self._graph.replay()

    def _forward(self, gates: bool) -> None:
        engine = self._engine
        for layer in range(engine.geometry.num_layers):
            self._multiply(layer % len(self._weights))
            if gates:
                engine.before_write(layer)
            self.write(layer, 0)
            if gates:
                engine.before_attention(layer)
            self.attention(layer, self._rows)
            if gates:
                engine.after_attention(layer)

    def warm_up(self) -> None:
        """A step without gates and copies, as torch asks for before a capture."""
        self._forward(gates=False)

    def write(self, layer: int, step: int) -> None:  # noqa: ARG002
        """As ``Model.write``, by the word of ``set_inputs``."""
        pages = self._written[layer]
        pages.copy_((self._word + layer).expand_as(pages))

    def attention(self, layer: int, rows: torch.Tensor) -> None:
        """As ``Model.attention``, of the pages that were loaded."""
        found = self._ring[layer][: len(rows)].sum(1)
        self.wrong += ((found != self.sums[layer].index_select(0, rows)) & self._loaded).sum()

    def wrong_promotions(self, copies: Runs) -> int:
        """Resident pages that do not hold the rows which were promoted to them."""
        wrong = 0
        views = layer_views(self._engine, self._compute)
        for block, row, count in copies.tolist():
            for layer, view in enumerate(views):
                sums = view[block : block + count].sum(1)
                wrong += int((sums != self.sums[layer, row : row + count]).sum())
        return wrong

    def spoil(self) -> None:
        """Fill all pages that copies go to with a word of their own, in the compute's order."""
        for pages in self._copied_to():
            pages.fill_(SPOILT)

    def wrong_spoilt(self) -> int:
        """Those pages that something was copied to since; the compute is idle."""
        return sum(int((pages != SPOILT).any(1).sum()) for pages in self._copied_to())

    def _copied_to(self) -> list[torch.Tensor]:
        resident = self._engine.geometry.resident_blocks
        views = layer_views(self._engine, self._compute)
        return [
            pages for view in views for pages in (view[1 + WRITTEN : resident], view[resident:])
        ]

    def close(self) -> None:
        """Let go of the graph, then of the engine's memory."""
        self._graph = self._bare = None
        super().close()


def cuda_capture(model: CapturedModel, compute: Any) -> Capture:
    """By torch, on the compute's stream."""

    def capture(body: Callable[[], None]) -> Graph:
        model.warm_up()
        torch.cuda.synchronize()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=compute.cuda_stream):
            body()
        torch.cuda.synchronize()
        model.wrong.zero_()
        found: Graph = graph
        return found

    return capture

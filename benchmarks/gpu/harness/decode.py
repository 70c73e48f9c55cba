"""Compute of the size of a decode step, over an engine's arena, that checks what it reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.gpu.harness.compute import Compute, layer_views
from benchmarks.gpu.harness.inputs import SmallCopies
from pie_vllm.engine.step_stats import StepStats
from pie_vllm.engine.streams import row_page
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import Runs, StepPlan


class LayerShape(NamedTuple):
    """Widths of a transformer layer's four products.

    Attributes:
        hidden: width of the residual stream.
        qkv: queries, keys and values together.
        gated: gate and up together; half of it goes down again.
    """

    hidden: int = 4096
    qkv: int = 6144
    gated: int = 28672


SMALL = LayerShape(64, 96, 448)
WEIGHT_SETS = 4
"""Different layers' weights in turn: more than the device's caches hold."""

WRITTEN = 4
"""Resident blocks, from 1, that each step stores and then writes over."""


class Model:
    """Layers of a decode step: products, a KV write, a read of all ring pages that is checked.

    Args:
        engine: over whose arena; its rows are filled by this.
        compute: where.
        shape: shape of a layer.
        rows: requests of the step.

    Attributes:
        wrong: ring pages that held other bytes than they should.
        sums: sums of the words of each row's pages, `[layer, row]`.
        inputs: copied by each step with a plan after its begin, if there are any.
    """

    def __init__(
        self, engine: TransferEngine, compute: Compute, shape: LayerShape, rows: int
    ) -> None:
        self._engine, self._compute = engine, compute
        sizes = engine.geometry
        views = layer_views(engine, compute)
        self._ring = [view[sizes.resident_blocks :] for view in views]
        self._written = [view[1 : 1 + WRITTEN] for view in views]
        options = {"dtype": compute.dtype, "device": compute.device}

        def weights(width: int, depth: int) -> torch.Tensor:
            return torch.randn(width, depth, **options) / width**0.5  # type: ignore[call-overload,no-any-return]

        self._weights = [
            (
                weights(shape.hidden, shape.qkv),
                weights(shape.hidden, shape.hidden),
                weights(shape.hidden, shape.gated),
                weights(shape.gated // 2, shape.hidden),
            )
            for _ in range(WEIGHT_SETS)
        ]
        self._input = torch.randn(rows, shape.hidden, **options)  # type: ignore[call-overload]
        self.inputs: SmallCopies | None = None
        self._graphs = [self._capture(turn) for turn in range(WEIGHT_SETS)]
        self.wrong = torch.zeros((), dtype=torch.int64, device=compute.device)
        self.sums = fill_rows(engine).to(compute.device)

    def _capture(self, turn: int) -> Any:
        """The products of a set of weights as a graph, as vLLM runs them; None on CPUs."""
        if self._compute.device.type == "cpu":
            return None
        self._multiply(turn)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._multiply(turn)
        return graph

    def products(self, layer: int) -> None:
        """What a layer computes beside its attention."""
        graph = self._graphs[layer % WEIGHT_SETS]
        if graph is None:
            self._multiply(layer % WEIGHT_SETS)
        else:
            graph.replay()

    def _multiply(self, turn: int) -> None:
        qkv, out, gated, down = self._weights[turn]
        hidden = self._input
        mixed = (hidden @ qkv)[:, : hidden.shape[1]] @ out
        wide = mixed @ gated
        half = wide.shape[1] // 2
        (torch.nn.functional.silu(wide[:, :half]) * wide[:, half:]) @ down

    def write(self, layer: int, step: int) -> None:
        """The KV write: the pages that the step stored hold other words afterwards."""
        self._written[layer].fill_(word(step, layer))

    def attention(self, layer: int, rows: torch.Tensor) -> None:
        """Read as many ring pages as there are rows, each of which must be that row's."""
        blocks = len(rows)
        found = self._ring[layer][:blocks].sum(1)
        self.wrong += (found != self.sums[layer].index_select(0, rows)).sum()

    def step(self, plan: StepPlan | None, rows: torch.Tensor) -> StepStats | None:
        """Submit one step with its gates, as vLLM would call them; without a plan, without them.

        Args:
            plan: plan of the step.
            rows: what the ring blocks from the first on must hold.
        """
        engine = self._engine
        layers = engine.geometry.num_layers
        if plan is None:
            for layer in range(layers):
                self.products(layer)
                self.write(layer, 0)
                if len(rows):
                    self.attention(layer, rows)
            return None
        engine.begin_step(plan, self._compute.stream)
        if self.inputs is not None:
            self.inputs.copy()
        for layer in range(layers):
            self.products(layer)
            engine.before_write(layer)
            self.write(layer, plan.step)
            engine.before_attention(layer)
            if len(rows):
                self.attention(layer, rows)
            engine.after_attention(layer)
        return engine.end_step()

    def wrong_stores(self, copies: Runs, step: int) -> int:
        """Pages among rows stored at `step` that do not hold what the step before wrote."""
        wrong = 0
        for _, first, count in copies.tolist():
            for row in range(first, first + count):
                for layer in range(self._engine.geometry.num_layers):
                    page = torch.frombuffer(row_page(self._engine, row, layer), dtype=torch.int64)
                    wrong += bool((page != word(step - 1, layer)).any())
        return wrong

    def close(self) -> None:
        """Let go of the engine's memory."""
        self._graphs.clear()
        self._ring.clear()
        self._written.clear()


def word(step: int, layer: int) -> int:
    """What a step writes to its pages of a layer."""
    return step * 4096 + layer + 1


def fill_rows(engine: TransferEngine) -> torch.Tensor:
    """Fill the pool's rows with words of their own; returns their sums, `[layer, row]`."""
    sizes = engine.geometry
    words = torch.arange(sizes.page_bytes // 8, dtype=torch.int64)
    sums = torch.zeros(sizes.num_layers, sizes.rows, dtype=torch.int64)
    for row in range(sizes.rows):
        for layer in range(sizes.num_layers):
            page = torch.frombuffer(row_page(engine, row, layer), dtype=torch.int64)
            torch.add(words, 1_000_003 * (row * sizes.num_layers + layer + 1), out=page)
            sums[layer, row] = int(page.sum())
    return sums

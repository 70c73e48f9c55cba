"""Is memory that is mapped several times one memory, in streams and in graphs?

First the engine's own test, with several geometries. Then thousands of rounds with values that
change: written by a copy through one layer's view and read by a kernel through another's, the
reverse, and by kernels through both. Before each write the reader's view is read, so that caches
hold the old value under the address that is read next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.harness.compute import (
    Compute,
    compute_of,
    external_stream,
    granularity,
    layer_views,
    shape,
)
from benchmarks.gpu.harness.context import Context
from pie_vllm.engine.streams import DriverStream
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.geometry import Geometry

LAYERS, SLOTS = 8, 2
PAIRS = [(a, b) for a in range(LAYERS) for b in range(LAYERS) if a != b and (a - b) % SLOTS == 0]

PAGES = ((16, 65536), (32, 24576), (3, 36864), (1, 1 << 20), (7, 8192))
"""Pooled blocks and bytes of a page; some fill their mapping, some do not."""

STEP = 1_000_003
"""From the values of one round to those of the next."""

BATCH = 64
"""Rounds between two looks at what the copies brought back."""


def geometries(unit: int, quick: bool) -> list[Geometry]:
    """Sizes that differ in everything that matters for mapping."""
    found = []
    for pooled, page in PAGES[: 2 if quick else None]:
        for layers, slots in ((8, 2), (12, 5), (3, 3), (32, 3))[: 2 if quick else None]:
            found.append(shape(layers, page, pooled + 5, pooled, slots, max(8, pooled), unit))
    return found


def run(context: Context) -> None:
    """All rounds; any mismatch fails the stage."""
    compute = compute_of(context.driver)
    unit = granularity(context.driver)
    if context.wants("self_test"):
        self_tests(context, unit)
    sizes = shape(LAYERS, 65536, 8, 4, SLOTS, BATCH, unit)
    with TransferEngine(sizes, driver=context.driver) as engine:
        rounds = Rounds(engine, compute)
        if context.wants("stream"):
            for name, body in rounds.ways().items():
                repeat(context, f"stream: {name}", body)
        if context.wants("graph"):
            if context.dry:
                context.report.note("no graphs without a GPU")
            else:
                from benchmarks.gpu.alias_graphs import GraphRounds

                graphs = GraphRounds(rounds)
                for name, body in graphs.ways().items():
                    repeat(context, f"graph: {name}", body)
                graphs.close()
        compute.synchronize()
        rounds.close()


def self_tests(context: Context, unit: int) -> None:
    """The engine's own test with each geometry."""
    for sizes in geometries(unit, context.quick):
        if not context.has_time(10, "all geometries of the self-test"):
            return
        with TransferEngine(sizes, driver=context.driver) as engine:
            engine.self_test()  # Raises where bytes are wrong.
        context.report.row(
            "engine.self_test",
            layers=sizes.num_layers,
            ring_slots=sizes.ring_slots,
            page_KiB=sizes.page_bytes // 1024,
            pooled_blocks=sizes.pooled_blocks,
            granularity_KiB=unit // 1024,
            passed=True,
        )


def repeat(context: Context, name: str, body: Callable[[int, int], int]) -> None:
    """Rounds of one way until there are enough; reports mismatches."""
    count = 3 * BATCH if context.quick else 4096
    done = wrong = 0
    while done < count and context.left > 0:
        wrong += body(done, BATCH)
        done += BATCH
    context.report.row("rounds", way=name, rounds=done, wrong_words=wrong)
    context.report.check(f"{name}, wrong words", wrong, "0", wrong == 0)
    if done < count:
        context.report.check(f"{name}, rounds", done, f">= {count}", False)


class Rounds:
    """Memory and streams that all ways share.

    Attributes:
        compute: where kernels run.
        stream: for copies; on a GPU the kernels run on it too, so that order is the stream's.
        pooled: for each layer its view of the first pooled page.
        staging: page-locked pages that copies come from and go to, one a round of a batch.
        base: a page of different words on the device.
        wrong: words that kernels found wrong.
    """

    def __init__(self, engine: TransferEngine, compute: Compute) -> None:
        self.compute = compute
        self._engine = engine
        sizes = engine.geometry
        self.page = sizes.page_bytes
        self.pooled = [view[sizes.resident_blocks] for view in layer_views(engine, compute)]
        self._bytes = compute.pinned(BATCH * self.page)
        self.staging = self._bytes.view(torch.int64).view(BATCH, -1)
        words = torch.arange(self.page // 8, dtype=torch.int64) * 7919
        self.host_base = words
        self.base = words.to(compute.device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=compute.device)
        self.stream = DriverStream(engine)
        compute.synchronize()

    def close(self) -> None:
        """Let go of the engine's memory."""
        self.stream.close()
        self.pooled.clear()

    def ways(self) -> dict[str, Callable[[int, int], int]]:
        """How a round may go; each takes the first round and how many, and counts wrong words."""
        return {
            "copy in through one view, kernel reads another": self.copy_then_kernel,
            "kernel writes one view, copy out through another": self.kernel_then_copy,
            "kernel writes one view, kernel reads another": self.kernel_then_kernel,
        }

    def copy_then_kernel(self, first: int, count: int) -> int:
        """A copy in by the engine's driver, then a comparison on the device."""
        for i in range(count):
            self.staging[i] = self.host_base + (first + i) * STEP
        with self.kernels():
            for i in range(count):
                writer, reader = self.views(first + i)
                self.read(reader)
                self.copy("load", writer, i)
                self.compare(reader, first + i)
        return self.found()

    def kernel_then_copy(self, first: int, count: int) -> int:
        """A kernel's write, then a copy out by the engine's driver."""
        with self.kernels():
            for i in range(count):
                writer, reader = self.views(first + i)
                self.copy("store", reader, i)
                torch.add(self.base, (first + i) * STEP, out=writer)
                self.copy("store", reader, i)
        return self.found() + self.staged(first, count)

    def kernel_then_kernel(self, first: int, count: int) -> int:
        """Both by kernels."""
        with self.kernels():
            for i in range(count):
                writer, reader = self.views(first + i)
                self.read(reader)
                torch.add(self.base, (first + i) * STEP, out=writer)
                self.compare(reader, first + i)
        return self.found()

    def views(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two views of one memory, others in the next round."""
        writer, reader = PAIRS[number % len(PAIRS)]
        return self.pooled[writer], self.pooled[reader]

    def kernels(self) -> Any:
        """Run kernels on the stream of the copies; in a dry run copies end before each kernel."""
        if self.compute.device.type == "cpu":
            return torch.no_grad()
        return torch.cuda.stream(external_stream(self.stream.id))

    def copy(self, direction: str, view: torch.Tensor, place: int) -> None:
        """Copy a page between staging and the device by the engine's driver."""
        there, here = view.data_ptr(), self.staging[place].data_ptr()
        target, source = (there, here) if direction == "load" else (here, there)
        self.stream.copy(direction, target, source, self.page)
        if self.compute.device.type == "cpu":
            self.stream.synchronize()

    def read(self, view: torch.Tensor) -> None:
        """Bring the view's words into the caches."""
        view.sum()

    def compare(self, view: torch.Tensor, number: int) -> None:
        """Count the words that are not those of that round."""
        self.wrong += (view != self.base + number * STEP).sum()

    def staged(self, first: int, count: int) -> int:
        """Wrong words among those that were copied out."""
        wanted = torch.stack([self.host_base + (first + i) * STEP for i in range(count)])
        return int((self.staging[:count] != wanted).sum())

    def found(self) -> int:
        """Wrong words of kernels since the last call."""
        self.stream.synchronize()
        self.compute.synchronize()
        count = int(self.wrong)
        self.wrong.zero_()
        self.compute.synchronize()
        return count

"""The rounds of `benchmarks.gpu.aliases` inside CUDA graphs, replayed with changing contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.aliases import PAIRS, STEP, Rounds
from benchmarks.gpu.harness.compute import external_stream, new_stream

Way = Callable[[int, int], int]


class GraphRounds:
    """Graphs that are captured once and replayed; a number on the device tells them the round.

    The engine's batched copies cannot be captured, and pie does not capture them: graphs of vLLM
    are replayed after copies. Both are tried: copies before a graph that reads, and copies of
    torch's that are nodes of the graph.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        device = rounds.compute.device
        self._offset = torch.zeros((), dtype=torch.int64, device=device)
        self._pinned = torch.empty_like(rounds.host_base, pin_memory=True)
        self._stream = external_stream(rounds.stream.id)
        self._graphs: list[Any] = []

    def ways(self) -> dict[str, Way]:
        """The ways of `Rounds.ways`, each with a graph for every pair of views."""
        return {
            "engine's copy in before the graph, kernel in it reads another view": self._way(
                self._reads, copies=True
            ),
            "copy node in, kernel node reads another view": self._way(self._copies_and_reads),
            "kernel node writes, copy node out of another view": self._way(
                self._writes_and_copies, out=True
            ),
            "kernel node writes, kernel node reads another view": self._way(self._writes_and_reads),
        }

    def close(self) -> None:
        """Let go of the graphs before the memory that they name."""
        torch.cuda.synchronize()
        self._graphs.clear()

    def _way(
        self,
        body: Callable[[torch.Tensor, torch.Tensor], None],
        copies: bool = False,
        out: bool = False,
    ) -> Way:
        rounds = self._rounds
        graphs = [self._capture(body, *rounds.views(number)) for number in range(len(PAIRS))]
        self._graphs += graphs

        def way(first: int, count: int) -> int:
            wrong = 0
            for number in range(first, first + count):
                writer, _ = rounds.views(number)
                # The round before has ended, so host memory may change.
                wanted = rounds.host_base + number * STEP
                self._pinned.copy_(-wanted if out else wanted)
                rounds.staging[0] = wanted
                with torch.cuda.stream(self._stream):
                    self._offset.fill_(number * STEP)
                    if copies:
                        rounds.copy("load", writer, 0)
                    graphs[number % len(PAIRS)].replay()
                self._stream.synchronize()
                if out:
                    wrong += int((self._pinned != wanted).sum())
            return wrong + rounds.found()

        return way

    def _capture(
        self,
        body: Callable[[torch.Tensor, torch.Tensor], None],
        writer: torch.Tensor,
        reader: torch.Tensor,
    ) -> Any:
        side = new_stream()
        with torch.cuda.stream(side):  # As torch asks for: once before the capture.
            body(writer, reader)
        torch.cuda.synchronize()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body(writer, reader)
        self._rounds.wrong.zero_()
        torch.cuda.synchronize()
        return graph

    def _compare(self, reader: torch.Tensor) -> None:
        self._rounds.wrong.add_((reader != self._rounds.base + self._offset).sum())

    def _reads(self, _writer: torch.Tensor, reader: torch.Tensor) -> None:
        self._compare(reader)

    def _copies_and_reads(self, writer: torch.Tensor, reader: torch.Tensor) -> None:
        reader.sum()
        writer.copy_(self._pinned, non_blocking=True)
        self._compare(reader)

    def _writes_and_copies(self, writer: torch.Tensor, reader: torch.Tensor) -> None:
        torch.add(self._rounds.base, self._offset, out=writer)
        self._pinned.copy_(reader, non_blocking=True)

    def _writes_and_reads(self, writer: torch.Tensor, reader: torch.Tensor) -> None:
        reader.sum()
        torch.add(self._rounds.base, self._offset, out=writer)
        self._compare(reader)

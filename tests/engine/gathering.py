"""What the tests of the gather kernel share: an engine with room for its batches, and steps."""

from __future__ import annotations

from typing import NamedTuple

from pie_vllm.engine.transfer_engine import TransferEngine
from tests.engine.driving import View
from tests.helpers.standin import load

FEWEST = 16
PAGE_BYTES = 1000
SIZES = {
    "page_bytes": PAGE_BYTES,
    "resident_blocks": 40,
    "pooled_blocks": 40,
    "rows": 80,
    "chunk_rows": 40,
}
LAYERS = range(6)
FIRST = SIZES["resident_blocks"]
"""The first pooled block."""

Triples = tuple[tuple[int, int, int], ...]


def singles(count: int = FEWEST, row: int = 0, block: int = FIRST) -> Triples:
    """Runs of one block."""
    return tuple((block + i, row + i, 1) for i in range(count))


def write_rows(engine: TransferEngine, count: int = FEWEST, row: int = 0, tag: int = 1) -> None:
    """Rows that have tags which count up."""
    view = View(engine)
    for i in range(count):
        view.write_row(row + i, tag + i)


class Seen:
    """What attention found in the first pooled blocks."""

    def __init__(self, engine: TransferEngine, count: int = FEWEST, tag: int = 1) -> None:
        self.view, self.count, self.tag = View(engine), count, tag
        self.layers: list[int] = []
        self.wrong: list[tuple[int, int]] = []

    def __call__(self, layer: int) -> None:
        self.layers.append(layer)
        self.wrong += [
            (layer, i)
            for i in range(self.count)
            if not self.view.holds(layer, FIRST + i, self.tag + i)
        ]


class Paths(NamedTuple):
    """How copies to the device were submitted."""

    launches: int
    batches: int

    @classmethod
    def now(cls) -> Paths:
        calls = load().calls
        return cls(calls("cuLaunchKernel"), calls("cuMemcpyBatchAsync"))

    def since(self) -> Paths:
        later = Paths.now()
        return Paths(later.launches - self.launches, later.batches - self.batches)

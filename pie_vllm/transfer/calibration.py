"""How fast the link between CPU pool and device is on this machine, measured at start."""

from __future__ import annotations

from typing import NamedTuple

from pie_vllm.errors import TransferError
from pie_vllm.policy.geometry import Geometry, round_up
from pie_vllm.policy.plan import Copy, StepPlan
from pie_vllm.transfer.engine import TransferEngine
from pie_vllm.transfer.streams import counters

RUN_LENGTHS = (1, 4, 16)
"""Neighbouring blocks that make one copy of a layer: single pages, and runs as rows merge to."""

SECONDS = 0.025
"""That one measurement is to last about: long against the start of a copy."""

REPEATS = 2
"""The faster counts: a machine that does something else for a moment makes a link seem slow."""

SCRATCH_BYTES = 64 << 20
"""On the device and in CPU memory, while the measurement lasts; more only for larger pages."""


class PieceSpeed(NamedTuple):
    """Bytes per second of copies of one size.

    Attributes:
        piece_bytes: of one copy.
        load: from the CPU pool to the device.
        store: from the device to the CPU pool.
    """

    piece_bytes: int
    load: float
    store: float


class LinkSpeed(NamedTuple):
    """What was measured.

    Attributes:
        pieces: each direction alone, single pages first.
        load_both, store_both: each direction while the other is busy too, bytes per second,
            with the longest runs.
    """

    pieces: tuple[PieceSpeed, ...]
    load_both: float
    store_both: float

    @property
    def load(self) -> float:
        """Bytes per second to the device that a plan can count on: those of single pages."""
        return self.pieces[0].load

    def __str__(self) -> str:
        """For the log."""
        alone = ", ".join(
            f"{p.load / 1e9:.2f}/{p.store / 1e9:.2f} in pieces of {p.piece_bytes / 1024:.0f} KiB"
            for p in self.pieces
        )
        return (
            f"to/from the device {alone}; both at once "
            f"{self.load_both / 1e9:.2f}/{self.store_both / 1e9:.2f} GB/s"
        )


def scratch_geometry(num_layers: int, page_bytes: int, granularity: int) -> Geometry:
    """Blocks to copy, within ``SCRATCH_BYTES`` on the device if three pages are.

    Arguments as ``measure_link``; fewer layers where they are large, down to one block each way.
    """
    layers = max(1, min(num_layers, SCRATCH_BYTES // round_up(3 * page_bytes, granularity)))
    layer_bytes = SCRATCH_BYTES // layers // granularity * granularity
    most = max(1, min(RUN_LENGTHS[-1], (layer_bytes // page_bytes - 1) // 2))
    return Geometry(
        num_layers=layers,
        page_bytes=page_bytes,
        resident_blocks=2 * most + 1,
        pooled_blocks=1,
        ring_slots=1,
        rows=2 * most,
        chunk_rows=2 * most,
        granularity=granularity,
    )


def measure_link(
    num_layers: int,
    page_bytes: int,
    *,
    granularity: int,
    driver: str = "host",
    link_bytes_per_s: float | None = None,
) -> LinkSpeed:
    """Copy blocks of this shape to and fro through an engine of its own, which is closed again.

    The engine copies as it does in service, a batch for each layer, on its two streams, but
    beside no compute: where both share memory bandwidth, steps will see less.

    Args:
        num_layers: attention layers with KV.
        page_bytes: one block in one layer.
        granularity: bytes that the driver maps in one piece.
        driver: of the engine.
        link_bytes_per_s: emulated speed of the host driver; None is the machine's.

    Raises:
        TransferError: no memory for it, a copy failed, or it has no time of its own.
    """
    sizes = scratch_geometry(num_layers, page_bytes, granularity)
    with TransferEngine(sizes, driver=driver, link_bytes_per_s=link_bytes_per_s) as engine:
        return _Bench(engine).measure()


class _Moved(NamedTuple):
    """Bytes and seconds of copies that are complete."""

    loaded: int
    stored: int
    load_seconds: float
    store_seconds: float


class _Bench:
    def __init__(self, engine: TransferEngine) -> None:
        self._engine, self._step = engine, 0
        self._most = engine.geometry.rows // 2

    def measure(self) -> LinkSpeed:
        self._move(1, 1)  # Starts the streams.
        probe = self._move(1, 1, stores=False)
        row_bytes = self._engine.geometry.row_bytes
        blocks = max(1, min(self._most, int(SECONDS * _load_rate(probe) / row_bytes)))
        self._move(blocks, 1)  # Touches the pages.
        pieces = []
        for length in sorted({min(length, blocks) for length in RUN_LENGTHS}):
            count = blocks // length * length
            loads = [self._move(count, length, stores=False) for _ in range(REPEATS)]
            stores = [self._move(count, length, loads=False) for _ in range(REPEATS)]
            piece_bytes = length * self._engine.geometry.page_bytes
            pieces.append(
                PieceSpeed(piece_bytes, max(map(_load_rate, loads)), max(map(_store_rate, stores)))
            )
        both = self._move(blocks, blocks)
        return LinkSpeed(tuple(pieces), _load_rate(both), _store_rate(both))

    def _move(self, blocks: int, length: int, *, loads: bool = True, stores: bool = True) -> _Moved:
        """Store blocks 1 to ``most`` to rows from 0, load the blocks after them from the others."""
        self._step += 1
        most = self._most
        runs = [(first, min(length, blocks - first)) for first in range(0, blocks, length)]
        plan = StepPlan(
            self._step,
            tuple(Copy(1 + first, first, count) for first, count in runs) if stores else (),
            tuple(Copy(1 + most + first, most + first, count) for first, count in runs)
            if loads
            else (),
            (),
            (),
            forward=False,
        )
        before = [counters(self._engine, direction) for direction in ("load", "store")]
        self._engine.run_idle(plan)
        self._engine.drain()
        after = [counters(self._engine, direction) for direction in ("load", "store")]
        return _Moved(
            *(new.bytes - old.bytes for new, old in zip(after, before, strict=True)),
            *(new.seconds - old.seconds for new, old in zip(after, before, strict=True)),
        )


def _load_rate(moved: _Moved) -> float:
    return _rate(moved.loaded, moved.load_seconds)


def _store_rate(moved: _Moved) -> float:
    return _rate(moved.stored, moved.store_seconds)


def _rate(count: int, seconds: float) -> float:
    if seconds <= 0:
        raise TransferError("the driver gives no time for its copies: the link cannot be measured")
    return count / seconds

"""How fast the link between CPU pool and device is on this machine, measured at start."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from pie_vllm.errors import TransferError
from pie_vllm.policy.geometry import Geometry, round_up
from pie_vllm.policy.plan import Copy, StepPlan
from pie_vllm.transfer.engine import TransferEngine
from pie_vllm.transfer.gather import Images, NoGather, device_arch, gather_image, load_gather
from pie_vllm.transfer.streams import counters

RUN_LENGTHS = (1, 4, 16)
"""Neighbouring blocks that make one copy of a layer: single pages, and runs as rows merge to."""

GATHER_LENGTHS = RUN_LENGTHS[:2]
"""Of those the ones that the gather kernel is measured with: what is larger is not its work."""

FEWEST_PIECES = 16
"""In a batch that the gather kernel takes, as in ``cuda_gather.h``."""

MOST_BLOCKS = FEWEST_PIECES * GATHER_LENGTHS[-1]
"""Each way."""

GATHER_GAIN = 1.1
"""Times as fast as the copy engines the kernel must be: it takes SMs, and measurements differ."""

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
        gather: as ``load``, by the gather kernel; None: not measured.
    """

    piece_bytes: int
    load: float
    store: float
    gather: float | None = None

    @property
    def gathers(self) -> bool:
        """Whether the kernel is so much faster that it should be used."""
        return self.gather is not None and self.gather >= GATHER_GAIN * self.load


class LinkSpeed(NamedTuple):
    """What was measured.

    Attributes:
        pieces: each direction alone, single pages first.
        load_both, store_both: each direction while the other is busy too, bytes per second,
            with the longest runs.
        no_gather: why the gather kernel was not measured; empty where it was, or is not meant.
    """

    pieces: tuple[PieceSpeed, ...]
    load_both: float
    store_both: float
    no_gather: str = ""

    @property
    def load(self) -> float:
        """Bytes per second to the device that a plan can count on: those of single pages."""
        first = self.pieces[0]
        return first.gather if first.gathers and first.gather else first.load

    @property
    def gather_below(self) -> int:
        """Bytes of a piece below which the gather kernel was faster by 10 % or more; 0: never.

        Half-way, in powers, between the pieces where it was and the first where it was not.
        """
        faster = list(itertools.takewhile(lambda p: p.gathers, self.pieces))
        if not faster:
            return 0
        last = faster[-1].piece_bytes
        slower = [p for p in self.pieces[len(faster) :] if p.gather is not None]
        return math.isqrt(last * slower[0].piece_bytes) if slower else last + 1

    def __str__(self) -> str:
        """For the log."""
        alone = ", ".join(
            f"{p.load / 1e9:.2f}/{p.store / 1e9:.2f} in pieces of {p.piece_bytes / 1024:.0f} KiB"
            for p in self.pieces
        )
        return (
            f"to/from the device {alone}; both at once "
            f"{self.load_both / 1e9:.2f}/{self.store_both / 1e9:.2f} GB/s{self._gather_text()}"
        )

    def _gather_text(self) -> str:
        if self.no_gather:
            return f"; no gather kernel: {self.no_gather}"
        measured = ", ".join(
            f"{p.gather / 1e9:.2f} in pieces of {p.piece_bytes / 1024:.0f} KiB"
            for p in self.pieces
            if p.gather is not None
        )
        if not measured:
            return ""
        below = self.gather_below
        use = f"worth it below {below / 1024:.4g} KiB" if below else "not worth it"
        return f"; to it by the gather kernel {measured}: {use}"


def scratch_geometry(num_layers: int, page_bytes: int, granularity: int) -> Geometry:
    """Blocks to copy, within ``SCRATCH_BYTES`` on the device if three pages are.

    Arguments as ``measure_link``; fewer layers where blocks are large, down to one block each way.
    """
    wanted = round_up((2 * MOST_BLOCKS + 1) * page_bytes, granularity)
    layers = max(1, min(num_layers, SCRATCH_BYTES // wanted))
    layer_bytes = SCRATCH_BYTES // layers // granularity * granularity
    most = max(1, min(MOST_BLOCKS, (layer_bytes // page_bytes - 1) // 2))
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
    gather: Images | None = gather_image,
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
        gather: where the gather kernel is from, for a device that runs kernels; None: leave it out.

    Raises:
        TransferError: no memory for it, a copy failed, or it has no time of its own.
    """
    sizes = scratch_geometry(num_layers, page_bytes, granularity)
    with TransferEngine(sizes, driver=driver, link_bytes_per_s=link_bytes_per_s) as engine:
        return _Bench(engine).measure(gather)


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

    def measure(self, gather: Images | None) -> LinkSpeed:
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
        no_gather = ""
        if gather is not None and device_arch(self._engine) is not None:
            no_gather = self._measure_gather(gather, blocks, pieces)
        return LinkSpeed(tuple(pieces), _load_rate(both), _store_rate(both), no_gather)

    def _measure_gather(self, images: Images, blocks: int, pieces: list[PieceSpeed]) -> str:
        """Adds the kernel's speeds; the reason where there is none."""
        lengths = [length for length in GATHER_LENGTHS if blocks // length >= FEWEST_PIECES]
        if not lengths:
            return f"fewer than {FEWEST_PIECES} pages were measured"
        found = load_gather(self._engine, SCRATCH_BYTES, images=images)
        if isinstance(found, NoGather):
            return found.reason
        for i, length in enumerate(lengths):
            count = blocks // length * length
            try:
                loads = [self._move(count, length, stores=False) for _ in range(REPEATS)]
            except TransferError as error:
                return str(error)
            pieces[i] = pieces[i]._replace(gather=max(map(_load_rate, loads)))
        return ""

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

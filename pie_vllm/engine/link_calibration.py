"""How fast the link between CPU pool and device is on this machine, measured at start."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from pie_vllm.engine.gather import Images, NoGather, device_arch, gather_image, load_gather
from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import TransferError
from pie_vllm.geometry import Geometry, round_up
from pie_vllm.plan import NO_RUNS, Copy, StepPlan, runs

RUN_LENGTHS = (1, 4, 16)
"""Neighbouring blocks that make one copy of a layer: single pages, and runs as rows merge to."""

GATHER_PIECES_MIN = 16
"""Minimum number of short runs in a step that the gather kernel takes, as in ``step_table.h``."""

BLOCKS_MAX = GATHER_PIECES_MIN * RUN_LENGTHS[1]
"""Upper bound on blocks copied per direction, unless that takes less than ``BATCH_SECONDS``."""

GATHER_GAIN = 1.1
"""Speed-up over the copy engines from which the kernel is used: it takes SMs."""

SUBMIT_SHARE = 0.05
"""Maximum fraction of the calling thread's time for descriptors of copies while the link is full.

At 0.5 us each (cuMemcpyBatchAsync on an H100, vLLM PR 48434) and 55 GB/s it is that of 537 KiB."""

GATHER_CTAS = (1, 2, 4, 8)
"""Grid sizes of the kernel that are tried. At 64 KiB in flight per CTA, PCIe 5 needs 2 to 4."""

CTAS_SHARE = 0.97
"""Fraction of the fastest way's speed that a way which spares SMs or the thread must reach."""

UNMEASURED_CTAS = 8
"""Grid size where none was measured."""

SECONDS = 0.025
"""Target duration of one measurement in seconds: long against the start of a copy."""

BATCH_SECONDS = 0.0005
"""Minimum duration of a batch in seconds: its start and its events take microseconds."""

BATCHES_MAX = 64
"""Maximum number of batches in one measurement."""

REPEATS = 2
"""Measurements of which the fastest counts: other work on the machine makes a link seem slow."""

SCRATCH_BYTES = 64 << 20
"""Bytes of scratch memory on each side during a measurement; more only for larger pages."""

FAST_SCRATCH_BYTES = 1 << 30
"""Bytes of scratch memory for a link that copies the smaller scratch in too short a time."""

FAST_LAYERS = 2
"""Layers for such a link: more than one, so that copies of a layer follow those of another."""


class PieceSpeed(NamedTuple):
    """Bytes per second of copies of one size.

    Attributes:
        piece_bytes: size of one copy in bytes.
        load: bytes per second from the CPU pool to the device, by the copy engines.
        store: bytes per second from the device to the CPU pool.
        gather: bytes per second to the device by the gather kernel; None: not measured.
    """

    piece_bytes: int
    load: float
    store: float
    gather: float | None = None

    def gathers(self, submit_seconds: float = 0.0) -> bool:
        """Whether the kernel should be used.

        It should where it is so much faster, or no slower while the descriptors of copies would
        take the calling thread more than ``SUBMIT_SHARE`` of the time that the link takes for them.

        Args:
            submit_seconds: as in ``LinkSpeed``.
        """
        if self.gather is None:
            return False
        share = submit_seconds * self.load / self.piece_bytes
        gain = CTAS_SHARE if share > SUBMIT_SHARE else GATHER_GAIN
        return self.gather >= gain * self.load


class LinkSpeed(NamedTuple):
    """What was measured.

    Attributes:
        pieces: speeds of each direction alone, single pages first.
        load_both: bytes per second of loads while stores run too, with the longest runs.
        store_both: bytes per second of stores while loads run too, with the longest runs.
        no_gather: reason why the gather kernel was not measured; empty where there is none.
        by_ctas: grid sizes of the gather kernel, each with its bytes per second of single pages.
        submit_seconds: seconds of the calling thread per copy in a batch of single pages; 0 where
            the driver copies within its calls.
    """

    pieces: tuple[PieceSpeed, ...]
    load_both: float
    store_both: float
    no_gather: str = ""
    by_ctas: tuple[tuple[int, float], ...] = ()
    submit_seconds: float = 0.0

    @property
    def load(self) -> float:
        """Bytes per second to the device that a plan can count on: those of single pages."""
        first = self.pieces[0]
        by_kernel = first.gather if first.gathers(self.submit_seconds) else None
        return by_kernel or first.load

    @property
    def gather_blocks(self) -> int:
        """CTAs of the gather kernel: the fewest that are nearly as fast as the best."""
        return fewest_ctas(self.by_ctas)

    @property
    def gather_below(self) -> int:
        """Bytes of a piece below which the gather kernel should be used, as measured; 0: never.

        Half-way, in powers, between the pieces where it should and the first where it should not.
        """
        submit = self.submit_seconds
        faster = list(itertools.takewhile(lambda p: p.gathers(submit), self.pieces))
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
            f"{self.load_both / 1e9:.2f}/{self.store_both / 1e9:.2f} GB/s{self._submit_text()}"
            f"{self._gather_text()}"
        )

    def _submit_text(self) -> str:
        if not self.submit_seconds:
            return ""
        return f"; to submit a copy takes {1e6 * self.submit_seconds:.2f} us"

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
        widths = ", ".join(f"{rate / 1e9:.2f} with {ctas}" for ctas, rate in self.by_ctas)
        ctas = f"; {self.gather_blocks} CTAs ({widths})" if widths else ""
        return f"; to it by the gather kernel {measured}: {use}{ctas}"


def fewest_ctas(by_ctas: Sequence[tuple[int, float]]) -> int:
    """The smallest grid whose speed is within 3 % of the best; ``UNMEASURED_CTAS`` of none."""
    if not by_ctas:
        return UNMEASURED_CTAS
    least = CTAS_SHARE * max(rate for _, rate in by_ctas)
    return min(ctas for ctas, rate in by_ctas if rate >= least)


def scratch_geometry(
    num_layers: int,
    page_bytes: int,
    granularity: int,
    blocks: int = BLOCKS_MAX,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Geometry:
    """Blocks to copy, within ``scratch_bytes`` on the device if three pages are.

    Arguments as ``measure_link``; fewer layers where blocks are large, down to one block each way.

    Args:
        num_layers: upper bound on layers.
        page_bytes: bytes of one block in one layer.
        granularity: bytes that the driver maps in one piece.
        blocks: upper bound on blocks copied per direction.
        scratch_bytes: upper bound on bytes on each side.
    """
    wanted = round_up((2 * blocks + 1) * page_bytes, granularity)
    layers = max(1, min(num_layers, scratch_bytes // wanted))
    layer_bytes = scratch_bytes // layers // granularity * granularity
    blocks_max = max(1, min(blocks, (layer_bytes // page_bytes - 1) // 2))
    return Geometry(
        num_layers=layers,
        page_bytes=page_bytes,
        resident_blocks=2 * blocks_max + 1,
        pooled_blocks=1,
        ring_slots=1,
        rows=2 * blocks_max,
        chunk_rows=2 * blocks_max,
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
    beside no compute: where both share memory bandwidth, steps will see less. A link that copies
    the batches of a small scratch in less than ``BATCH_SECONDS`` is measured with a larger one,
    where there is memory for it.

    Args:
        num_layers: attention layers with KV.
        page_bytes: bytes of one block in one layer.
        granularity: bytes that the driver maps in one piece.
        driver: the engine's driver.
        link_bytes_per_s: emulated speed of the host driver; None is the machine's.
        gather: where the gather kernel is from, for a device that runs kernels; None: leave it out.

    Raises:
        TransferError: no memory for it, a copy failed, or it has no time of its own.
    """
    sizes = scratch_geometry(num_layers, page_bytes, granularity)

    def opened(sizes: Geometry) -> TransferEngine:
        return TransferEngine(sizes, driver=driver, link_bytes_per_s=link_bytes_per_s)

    engine, grows = opened(sizes), True
    while True:
        with engine:
            bench = _Bench(engine)
            larger = scratch_of_rate(engine.geometry, bench.probe(), num_layers)
            if not grows or larger.rows <= engine.geometry.rows:
                return bench.measure(gather)
        try:
            engine = opened(larger)
        except TransferError:  # Memory is short: better measured too slow than not at all.
            engine, grows = opened(sizes), False


def scratch_of_rate(sizes: Geometry, rate: float, num_layers: int) -> Geometry:
    """Scratch whose batches last ``BATCH_SECONDS``; the same where they do, larger where not.

    A batch that is shorter has too much of its start in its time, so that the rate is too low: from
    what the larger scratch shows this may be asked again, until ``FAST_SCRATCH_BYTES`` are taken.

    Args:
        sizes: scratch that the rate was measured with.
        rate: bytes per second of loads.
        num_layers: upper bound on layers.
    """
    blocks = math.ceil(rate * BATCH_SECONDS / sizes.page_bytes)
    if blocks <= sizes.rows // 2:
        return sizes
    blocks = max(blocks, GATHER_PIECES_MIN * RUN_LENGTHS[-1])
    layers = min(num_layers, FAST_LAYERS)
    return scratch_geometry(layers, sizes.page_bytes, sizes.granularity, blocks, FAST_SCRATCH_BYTES)


class _Moved(NamedTuple):
    """Bytes and seconds of copies that are complete, and of the calls that submitted them."""

    loaded: int
    stored: int
    load_seconds: float
    store_seconds: float
    submit_seconds: float
    copies: int


class _Bench:
    def __init__(self, engine: TransferEngine) -> None:
        self._engine, self._step = engine, 0
        self._blocks_max = engine.geometry.rows // 2
        self._blocks = 1
        # The host driver copies within its calls, which are no submission then.
        self._submits = device_arch(engine) is not None

    def probe(self) -> float:
        """Find how many blocks make a measurement; returns bytes per second of loads."""
        self._move(1, 1)  # Starts the streams.
        row_bytes = self._engine.geometry.row_bytes
        rate = _load_rate(self._move(1, 1, stores=False))
        self._blocks = max(1, min(self._blocks_max, int(SECONDS * rate / row_bytes)))
        self._move(self._blocks, 1)  # Touches the pages.
        # A single page's start is most of its time where the link is fast.
        for _ in range(2):
            rate = max(rate, _load_rate(self._move(self._blocks, 1, stores=False)))
            self._blocks = max(1, min(self._blocks_max, int(SECONDS * rate / row_bytes)))
        return rate

    def measure(self, gather: Images | None) -> LinkSpeed:
        """All lengths, both ways; after ``probe``."""
        blocks, pieces, submit = self._blocks, [], 0.0
        for length in sorted({min(length, blocks) for length in RUN_LENGTHS}):
            count = blocks // length * length
            loads = self._repeat(count, length, stores=False)
            stores = self._repeat(count, length, loads=False)
            piece_bytes = length * self._engine.geometry.page_bytes
            pieces.append(
                PieceSpeed(piece_bytes, max(map(_load_rate, loads)), max(map(_store_rate, stores)))
            )
            submit = submit or min(each.submit_seconds / each.copies for each in loads)
        both = max(self._repeat(blocks, blocks), key=_load_rate)
        found = LinkSpeed(tuple(pieces), _load_rate(both), _store_rate(both), submit_seconds=submit)
        if gather is None or not self._submits:
            return found
        return self._with_gather(found, gather)

    def _with_gather(self, found: LinkSpeed, images: Images) -> LinkSpeed:
        """``found`` with the kernel's speeds, or with the reason where there are none."""
        blocks, pieces = self._blocks, list(found.pieces)
        lengths = [length for length in RUN_LENGTHS if blocks // length >= GATHER_PIECES_MIN]
        if not lengths:
            return found._replace(no_gather=f"fewer than {GATHER_PIECES_MIN} pages were measured")
        threshold = 1 + max(pieces[i].piece_bytes for i in range(len(lengths)))
        loaded = load_gather(self._engine, threshold, images=images, blocks=GATHER_CTAS[-1])
        if isinstance(loaded, NoGather):
            return found._replace(no_gather=loaded.reason)
        try:
            by_ctas = []
            for ctas in GATHER_CTAS:
                self._engine.use_gather(None, threshold, ctas)
                by_ctas.append((ctas, self._rate_by_kernel(1)))
            self._engine.use_gather(None, threshold, fewest_ctas(by_ctas))
            for i, length in enumerate(lengths):
                pieces[i] = pieces[i]._replace(gather=self._rate_by_kernel(length))
        except TransferError as error:
            return found._replace(no_gather=str(error))
        return found._replace(pieces=tuple(pieces), by_ctas=tuple(by_ctas))

    def _rate_by_kernel(self, length: int) -> float:
        count = self._blocks // length * length
        return max(map(_load_rate, self._repeat(count, length, stores=False)))

    def _repeat(self, count: int, length: int, **ways: bool) -> list[_Moved]:
        first = self._move(count, length, **ways)
        taken = max(first.load_seconds, first.store_seconds, first.submit_seconds)
        times = max(1, min(BATCHES_MAX, int(SECONDS / taken))) if taken > 0 else 1
        return [self._move(count, length, times=times, **ways) for _ in range(REPEATS)]

    def _move(
        self, blocks: int, length: int, *, loads: bool = True, stores: bool = True, times: int = 1
    ) -> _Moved:
        """Store blocks from 1 to rows from 0, load the blocks after them from the others."""
        blocks_max = self._blocks_max
        pieces = [(first, min(length, blocks - first)) for first in range(0, blocks, length)]
        out = runs(Copy(1 + first, first, count) for first, count in pieces)
        back = runs(
            Copy(1 + blocks_max + first, blocks_max + first, count) for first, count in pieces
        )
        plan = StepPlan(
            self._step,
            out if stores else NO_RUNS,
            back if loads else NO_RUNS,
            NO_RUNS,
            (),
            forward=False,
        )
        before = [counters(self._engine, direction) for direction in ("load", "store")]
        submit = 0.0
        for _ in range(times):
            self._step += 1
            plan = plan._replace(step=self._step)
            begin = time.perf_counter()
            self._engine.run_idle(plan)
            submit += time.perf_counter() - begin
        self._engine.drain()
        after = [counters(self._engine, direction) for direction in ("load", "store")]
        load, store = zip(before, after, strict=True)
        return _Moved(
            load[1].bytes - load[0].bytes,
            store[1].bytes - store[0].bytes,
            load[1].seconds - load[0].seconds,
            store[1].seconds - store[0].seconds,
            submit if self._submits else 0.0,
            sum(new.copies - old.copies for old, new in (load, store)),
        )


def _load_rate(moved: _Moved) -> float:
    return _rate(moved.loaded, moved.load_seconds, moved.submit_seconds)


def _store_rate(moved: _Moved) -> float:
    return _rate(moved.stored, moved.store_seconds, moved.submit_seconds)


def _rate(count: int, seconds: float, submit_seconds: float) -> float:
    """No more than the device copies, nor than the calling thread can submit."""
    if seconds <= 0:
        raise TransferError("the driver gives no time for its copies: the link cannot be measured")
    return count / max(seconds, submit_seconds)

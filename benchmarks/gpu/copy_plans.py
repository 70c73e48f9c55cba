"""Plans of `benchmarks.gpu.copies`: a batch of copies for each layer, as in service."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.harness.compute import granularity, in_chunks, middle, shape
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.stepping import TIMED_EVERY
from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import NO_RUNS, Copy, StepPlan, runs

KIB, MIB = 1 << 10, 1 << 20
DIRECTIONS = ("load", "store", "both")
ASKED_SHARE = 0.95
"""Share of the peak that loads of real plans should reach."""


PIECES = tuple(4 * KIB << i for i in range(13))
"""4 KiB to 16 MiB."""


class Sizes(NamedTuple):
    """How much is copied.

    Attributes:
        area: bytes on each side.
        pieces: bytes of a piece.
        counts: pieces of a batch.
        repeats: number of runs of each measurement, whose median counts.
        layers: number of layers of the plans of the sweep.
        real_layers: number of layers of the real plans.
        real_blocks: number of blocks that one of them loads.
    """

    area: int = 256 * MIB
    pieces: tuple[int, ...] = PIECES
    counts: tuple[int, ...] = (1, 16, 256, 2048)
    repeats: int = 5
    layers: int = 4
    real_layers: int = 32
    real_blocks: int = 256


QUICK = Sizes(8 * MIB, (4 * KIB, 64 * KIB, MIB), (1, 16), 2, 2, 4, 16)


def sweep_plans(context: Context, sizes: Sizes, peak: dict[str, float]) -> None:
    """Plans of equal pieces: stores, promotions, or both, as steps that run no model do them."""
    unit = granularity(context.driver)
    for piece in sizes.pieces:
        most = sizes.area // (sizes.layers * piece)
        counts = [count for count in sizes.counts if count <= most] or [1]
        # Every second block, so that no two pieces are one run.
        span = 2 * max(counts)
        if not context.has_time(15, f"plans of pieces of {piece // KIB} KiB and more"):
            return
        plain = shape(sizes.layers, piece, 2 * span + 1, 1, 1, 2 * span, unit)
        with TransferEngine(plain, driver=context.driver) as engine:
            mover = Mover(engine)
            for count in counts:
                for direction in DIRECTIONS:
                    stores = [Copy(1 + 2 * i, 2 * i, 1) for i in range(count)]
                    loads = [Copy(1 + span + 2 * i, span + 2 * i, 1) for i in range(count)]
                    plan = (
                        stores if direction != "load" else [],
                        loads if direction != "store" else [],
                    )
                    mover.idle(*plan)
                    timed = [mover.idle(*plan) for _ in range(sizes.repeats)]
                    _plan_row(
                        context,
                        "plans: a batch for each layer",
                        timed,
                        peak[direction],
                        {
                            "piece_KiB": piece // KIB,
                            "count": count,
                            "direction": direction,
                        },
                    )


class Moved(NamedTuple):
    """Bytes of a plan; bytes per second by the device's clock, both ways added, and by ours."""

    bytes: int
    rate: float
    wall_rate: float


class Mover:
    """Runs plans on an engine, one after another."""

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = engine
        self._step = self._forwards = 0

    def idle(self, stores: Sequence[Copy], promotions: Sequence[Copy]) -> Moved:
        """A step that runs no model."""
        # Numbers apart: as after steps that had no plan.
        self._step += 2
        plan = StepPlan(self._step, runs(stores), runs(promotions), NO_RUNS, (), forward=False)
        return self._timed(lambda: self._engine.run_idle(plan))

    def forward(self, loads: Sequence[Copy]) -> Moved:
        """A step that loads ring pages for a model that computes nothing; its copies are timed.

        The same step runs before it until the engine's next one is one that it times.
        """
        while (self._forwards + 1) % TIMED_EVERY:
            self._one(loads)
        self._engine.drain()
        return self._timed(lambda: self._one(loads))

    def _one(self, loads: Sequence[Copy]) -> None:
        self._step += 1
        self._forwards += 1
        engine = self._engine
        plan = StepPlan(self._step, NO_RUNS, NO_RUNS, runs(loads), (), forward=True)
        engine.begin_step(plan)
        for layer in range(engine.geometry.num_layers):
            engine.before_write(layer)
            engine.before_attention(layer)
            engine.after_attention(layer)
        engine.end_step()

    def _timed(self, body: Callable[[], object]) -> Moved:
        engine = self._engine
        before = {way: counters(engine, way) for way in ("load", "store")}
        begin = time.perf_counter()
        body()
        engine.drain()
        wall = time.perf_counter() - begin
        count, rate = 0, 0.0
        for way, old in before.items():
            new = counters(engine, way)
            count += new.bytes - old.bytes
            if new.seconds > old.seconds:
                rate += (new.bytes - old.bytes) / (new.seconds - old.seconds)
        return Moved(count, rate, count / wall)


def _plan_row(
    context: Context, table: str, runs: Sequence[Moved], peak: float, what: dict[str, Any]
) -> float:
    """Report the median of some runs; returns the share of the peak by the device's clock."""
    rate, wall = middle([run.rate for run in runs]), middle([run.wall_rate for run in runs])
    context.report.row(
        table,
        **what,
        MiB=runs[0].bytes / MIB,
        GBps=rate / 1e9,
        share_of_peak=rate / peak,
        wall_GBps=wall / 1e9,
        wall_share_of_peak=wall / peak,
    )
    return rate / peak


def real_plans(context: Context, sizes: Sizes, peak: float) -> None:
    """Ring loads of a decode step of an 8B GQA model: runs as the tables of several requests give.

    Rows merge to runs where a request's blocks were demoted together; here of 1 to 16 blocks, and
    of single blocks for the worst case.
    """
    unit = granularity(context.driver)
    blocks, shares = sizes.real_blocks, {}
    for tokens in (16, 32, 64):
        page = tokens * 2 * 8 * 128 * 2
        plain = shape(sizes.real_layers, page, 4, blocks, 3, 2 * blocks, unit)
        if not context.has_time(20, f"real plans of blocks of {tokens} tokens and more"):
            return
        with TransferEngine(plain, driver=context.driver) as engine:
            mover = Mover(engine)
            for longest in (16, 1):
                runs = in_chunks(mixed_runs(blocks, 4, 2 * blocks, longest), plain.chunk_rows)
                moved = [mover.forward(runs) for _ in range(sizes.repeats)]
                shares[tokens, longest] = _plan_row(
                    context,
                    "real plans: ring loads of a step, 32 layers of 8 KV heads of 128 in bf16",
                    moved,
                    peak,
                    {
                        "block_tokens": tokens,
                        "page_KiB": page // KIB,
                        "longest_run": longest,
                        "runs": len(runs),
                        "blocks": blocks,
                    },
                )
    for (tokens, longest), share in shares.items():
        if longest > 1:
            name = f"loads of a real plan, blocks of {tokens} tokens, share of the peak"
            ok = share >= ASKED_SHARE
            context.report.check(name, share, f">= {ASKED_SHARE}", ok, target=True)


def mixed_runs(blocks: int, first_block: int, rows: int, longest: int) -> list[Copy]:
    """Runs of up to `longest` blocks that fill all pooled ids, at rows that are apart."""
    random_ = random.Random(blocks)
    lengths: list[int] = []
    while sum(lengths) < blocks:
        lengths.append(min(random_.randint(1, longest), blocks - sum(lengths)))
    # As many rows are free between the runs as there are more of them.
    row, runs, block = 0, [], first_block
    gap = max(1, (rows - blocks) // len(lengths))
    for length in lengths:
        runs.append(Copy(block, row, length))
        block += length
        row += length + gap
    random_.shuffle(runs)
    return runs

"""How fast are copies, by size, number and direction, and how near to the link's peak are plans?

The peak is torch's: large pinned copies, the best of several. Single copies go through the
engine's driver one call each; plans go as in service, one batch for each layer. Device time is by
events around a batch (the engine's counters), wall time by this thread's clock, submission and all.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.copy_gather import gather
from benchmarks.gpu.copy_plans import (
    DIRECTIONS,
    KIB,
    MIB,
    QUICK,
    Sizes,
    real_plans,
    sweep_plans,
)
from benchmarks.gpu.harness.compute import (
    Compute,
    compute_of,
    granularity,
    middle,
    new_stream,
    shape,
    timed_event,
)
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.stepping import empty_step
from pie_vllm.engine.streams import DriverEvent, DriverStream, row_page
from pie_vllm.engine.transfer_engine import TransferEngine


def run(context: Context) -> None:
    """All parts; the peak always, for the others are compared with it."""
    compute, sizes = compute_of(context.driver), QUICK if context.quick else Sizes()
    peak = measure_peak(context, compute, sizes)
    if context.wants("real"):
        real_plans(context, sizes, peak["load"])
    if context.wants("plans"):
        sweep_plans(context, sizes, peak)
    if context.wants("single"):
        single_copies(context, sizes, peak)
    if context.wants("gather"):
        gather(context, compute, sizes, peak["load"])


def measure_peak(context: Context, compute: Compute, sizes: Sizes) -> dict[str, float]:
    """Bytes per second of large pinned copies by torch, the best of some; each way of both."""
    host = [compute.pinned(sizes.area) for _ in range(2)]
    device = [torch.zeros(sizes.area, dtype=torch.int8, device=compute.device) for _ in range(2)]
    streams: list[Any] = [None, None]
    if not context.dry:
        streams = [new_stream() for _ in range(2)]

    def copy(way: int, stream: Any) -> float:
        target, source = (device[0], host[0]) if way == 0 else (host[1], device[1])
        start = time.perf_counter()
        if stream is None:
            target.copy_(source)
            return time.perf_counter() - start
        with torch.cuda.stream(stream):
            marks = [timed_event(), timed_event()]
            marks[0].record(stream)
            for _ in range(4):
                target.copy_(source, non_blocking=True)
            marks[1].record(stream)
        busy[way] = marks
        return 0.0

    busy: dict[int, list[Any]] = {}

    def seconds(ways: Sequence[int]) -> dict[int, float]:
        taken = {way: copy(way, streams[way]) for way in ways}
        compute.synchronize()
        for way in ways:
            if streams[way] is not None:
                taken[way] = busy[way][0].elapsed_time(busy[way][1]) / 4e3
        return taken

    peak: dict[str, float] = {}
    for name, ways in (("load", (0,)), ("store", (1,)), ("both", (0, 1))):
        seconds(ways)
        runs = [seconds(ways) for _ in range(2 * sizes.repeats)]
        rates = [[sizes.area / run[way] for way in ways] for run in runs]
        best = max(rates, key=sum)
        peak[name] = sum(best)
        context.report.row(
            "peak: torch.Tensor.copy_ of pinned memory",
            direction=name,
            MiB=sizes.area // MIB,
            GBps=peak[name] / 1e9,
            of_which_load=best[0] / 1e9 if 0 in ways else None,
        )
    return peak


def single_copies(context: Context, sizes: Sizes, peak: dict[str, float]) -> None:
    """Each piece by a call of its own, at places that are apart on both sides."""
    unit = granularity(context.driver)
    page = max(sizes.pieces)
    blocks = sizes.area // page
    half = max(1, blocks // 2)
    plain = shape(1, page, 2 * half + 1, 1, 1, 2 * half, unit)
    with TransferEngine(plain, driver=context.driver) as engine, timed_streams(engine) as lanes:
        host = _address(engine, 0)
        device = engine.arena.address + plain.page_offset(0, 1)
        area = half * page
        for piece in sizes.pieces:
            for count in sizes.counts:
                if not context.has_time(5, "single copies of all sizes"):
                    return
                if piece * count > area:
                    continue
                for direction in DIRECTIONS:
                    ways = [d for d in ("load", "store") if direction in (d, "both")]
                    rates, walls = [], []
                    for _ in range(sizes.repeats):
                        begin = time.perf_counter()
                        for lane in ways:
                            lanes[lane].start.record(lanes[lane].stream)
                        for place in _places(count, area // piece):
                            for way in ways:
                                offset = place * piece + (area if way == "store" else 0)
                                there, here = device + offset, host + offset
                                target, source = (there, here) if way == "load" else (here, there)
                                lanes[way].stream.copy(way, target, source, piece)
                        for way in ways:
                            lanes[way].end.record(lanes[way].stream)
                        for way in ways:
                            lanes[way].stream.synchronize()
                        walls.append(time.perf_counter() - begin)
                        spans = [lanes[w].start.seconds_until(lanes[w].end) for w in ways]
                        rates.append(sum(piece * count / max(span, 1e-9) for span in spans))
                    context.report.row(
                        "single copies: one driver call each",
                        piece_KiB=piece // KIB,
                        count=count,
                        direction=direction,
                        GBps=middle(rates) / 1e9,
                        share_of_peak=middle(rates) / peak[direction],
                        wall_us_per_copy=1e6 * middle(walls) / (count * len(ways)),
                    )


class Lane(NamedTuple):
    """A stream with two marks."""

    stream: DriverStream
    start: DriverEvent
    end: DriverEvent


@contextmanager
def timed_streams(engine: TransferEngine) -> Iterator[dict[str, Lane]]:
    """A lane for each direction."""
    empty_step(engine)
    lanes = {
        name: Lane(DriverStream(engine), DriverEvent(engine), DriverEvent(engine))
        for name in ("load", "store")
    }
    yield lanes
    for lane in lanes.values():
        lane.stream.close()
        lane.start.close()
        lane.end.close()


def _address(engine: TransferEngine, row: int) -> int:
    return ctypes.addressof(row_page(engine, row, 0))


def _places(count: int, among: int) -> list[int]:
    """Different places, none beside the one before where there is room."""
    order = list(range(0, among, 2)) + list(range(1, among, 2))
    return order[:count]

"""How much of the loads do decode steps hide, and what do loads take from them?

An engine beside compute of the size of an 8B model's decode step, layer by layer: products, a KV
write, and a read of all ring pages, each of which is checked. Loads go from none to more than the
link brings while a layer computes. Every step also stores a few pages and writes over them.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import NamedTuple

import torch

from benchmarks.gpu.harness.compute import (
    Compute,
    compute_of,
    granularity,
    in_chunks,
    middle,
    shape,
)
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.decode import SMALL, WRITTEN, LayerShape, Model
from benchmarks.gpu.harness.inputs import SmallCopies
from benchmarks.gpu.harness.stepping import TIMED_EVERY
from benchmarks.harness.stats import percentile
from pie_vllm.engine.gather import NoGather, load_gather
from pie_vllm.engine.link_calibration import GATHER_CTAS, measure_link
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import NO_RUNS, Copy, StepPlan, runs

SHARES = (0.0, 0.25, 0.5, 0.8, 0.95, 1.1, 1.5, 2.0)
"""Loads of a step, as shares of what the link brings while the layers compute; 0 is gates and
stores alone."""

INPUT_SHARES = (0.0, 0.5, 0.95)
"""At which small copies beside loads are measured."""

KERNEL_SHARES = (0.5, 0.95)
"""At which loads by the gather kernel are measured, for each number of its CTAs."""

KERNEL = "single pages by the gather kernel beside compute, by its CTAs; 0: by the copy engines"

WAYS = ((True, True), (False, True), (True, False))
"""Whether a step's begin submits the copies of its first layer alone, and whether batches ask for
overlap with compute; the first is what is served."""

LONGEST_RUN = 16
"""Blocks of a plan's runs, where nothing else is said."""

HIDDEN_BELOW = 0.8
"""Up to this share of the link, loads should cost no more than `SLOWDOWN`."""

SLOWDOWN = 1.01


class Sizes(NamedTuple):
    """Sizes of this stage.

    Attributes:
        layers: number of layers of the model.
        page: bytes of a block in one layer: 16 tokens of 8 KV heads of 128 in bf16.
        layer: widths.
        batches: requests of a step.
        steps: number of steps of one measurement.
        turns: number of measurements with and without loads.
        most_blocks: upper bound on the blocks that a step loads.
    """

    layers: int = 32
    page: int = 65536
    layer: LayerShape = LayerShape()
    batches: tuple[int, ...] = (32, 128, 256)
    steps: int = 12
    turns: int = 5
    most_blocks: int = 1024


QUICK = Sizes(6, 8192, SMALL, (8,), 4, 2, 24)


def run(context: Context) -> None:
    """All rings, batches and loads."""
    compute = compute_of(context.driver)
    sizes, unit = QUICK if context.quick else Sizes(), granularity(context.driver)
    link = measure_link(sizes.layers, sizes.page, granularity=unit, driver=context.driver).load
    context.report.fact("link to the device, GB/s", link / 1e9)
    wrong = stored_wrong = 0
    slots = [slots for slots in (3, 2, 4) if context.wants(f"ring{slots}")]
    for ring, batch in itertools.product(slots, sizes.batches):
        if not context.has_time(20, f"a ring of {ring} with {batch} requests and what follows"):
            break
        with compute.on():
            found = one_setting(context, compute, sizes, unit, ring, batch, link)
        wrong, stored_wrong = wrong + found[0], stored_wrong + found[1]
    if slots:
        with compute.on():
            control(context, compute, sizes, unit)
    context.report.check("ring pages that held other bytes", wrong, "0", wrong == 0)
    context.report.check("stored rows that held other bytes", stored_wrong, "0", stored_wrong == 0)


def one_setting(
    context: Context, compute: Compute, sizes: Sizes, unit: int, ring: int, batch: int, link: float
) -> tuple[int, int]:
    """All loads with one ring and batch; returns wrong ring pages and wrong stored pages."""
    most = sizes.most_blocks
    rows = 2 * most + 4 * WRITTEN
    geometry = shape(sizes.layers, sizes.page, 1 + WRITTEN, most, ring, rows, unit)
    with TransferEngine(geometry, driver=context.driver) as engine:
        engine.self_test()  # It leaves zeros, so before the rows are filled.
        model = Model(engine, compute, sizes.layer, batch)
        bench = Bench(engine, compute, model, sizes)
        bench.timed(None, 0)  # Warms up.
        plain = middle([bench.timed(None, 0) for _ in range(3)])
        feeds = link * plain / geometry.row_bytes
        for share in SHARES:
            blocks = min(most, math.ceil(share * feeds))
            if context.has_time(10, f"{share:g} of the link and more, ring {ring}, {batch} rows"):
                measure(context, bench, ring, batch, share, blocks)
            if batch == sizes.batches[0] and (share in INPUT_SHARES or blocks == most):
                small_copies(context, bench, ring, share, blocks)
            if batch == sizes.batches[0] and share in KERNEL_SHARES:
                by_kernel(context, bench, ring, batch, share, blocks)
            if blocks == most and share * feeds > most:
                context.report.note(f"ring {ring}, {batch} rows: no more than {most} blocks loaded")
                break
        compute.synchronize()
        found = int(model.wrong), bench.stored_wrong
        model.close()
    return found


def control(context: Context, compute: Compute, sizes: Sizes, unit: int) -> None:
    """The checks must see copies that are left out, or they would show nothing."""
    few = sizes._replace(most_blocks=8)
    geometry = shape(few.layers, few.page, 1 + WRITTEN, 8, 2, 16 + 4 * WRITTEN, unit)
    for debug in ("skip_loads", "skip_stores"):
        with TransferEngine(geometry, driver=context.driver, debug=(debug,)) as engine:
            model = Model(engine, compute, few.layer, few.batches[0])
            bench = Bench(engine, compute, model, few)
            bench.timed(8, 8)
            compute.synchronize()
            wrong = int(model.wrong) if debug == "skip_loads" else bench.stored_wrong
            model.close()
        context.report.check(f"pages found wrong with {debug}", wrong, "> 0", wrong > 0)


def measure(
    context: Context, bench: Bench, ring: int, batch: int, share: float, blocks: int
) -> None:
    """Steps with and without loads in turns; both read as many pages."""
    plain, loaded, load_seconds, stalls = [], [], [], []
    for _ in range(bench.sizes.turns):
        plain.append(bench.timed(None, blocks))
        loaded.append(bench.timed(blocks, blocks))
        load_seconds.append(bench.load_seconds)
        if bench.stalls:
            stalls.append(middle(bench.stalls))
    ratios = [a / b for a, b in zip(loaded, plain, strict=True)]
    stall, copying = middle(stalls), middle(load_seconds)
    slower = middle(ratios)
    context.report.row(
        "steps with loads beside the same steps without",
        ring_slots=ring,
        requests=batch,
        share_of_link=share,
        blocks=blocks,
        step_ms=1e3 * middle(plain),
        step_with_loads_ms=1e3 * middle(loaded),
        ratio=slower,
        ratio_least=min(ratios),
        ratio_most=max(ratios),
        copies_ms=1e3 * copying,
        stall_ms=1e3 * stall,
        share_hidden=1 - stall / copying if blocks and copying else None,
        slowdown_beyond_waits=slower - 1 - stall / middle(plain),
        submission_ms=1e3 * bench.submission,
        GBps=blocks * bench.row_bytes / copying / 1e9 if blocks and copying else None,
    )
    if share <= HIDDEN_BELOW:
        name = f"ring {ring}, {batch} requests, {share:g} of the link: step beside one without"
        context.report.check(name, slower, f"<= {SLOWDOWN}", slower <= SLOWDOWN, target=True)


def by_kernel(
    context: Context, bench: Bench, ring: int, batch: int, share: float, blocks: int
) -> None:
    """What loads take from compute, and how fast they are, for each width of the kernel."""
    whole_rows = bench.row_bytes
    loaded = load_gather(bench.engine, whole_rows)
    if isinstance(loaded, NoGather):
        context.report.note(f"loads by the gather kernel beside compute: {loaded.reason}")
        return
    bench.longest_run = 1
    for ctas in (0, *GATHER_CTAS):
        if not context.has_time(5, f"loads by {ctas} CTAs and more"):
            break
        bench.engine.use_gather(None, whole_rows if ctas else 1, ctas or 1)
        plain, steps, copying, submission = [], [], [], []
        for _ in range(bench.sizes.turns):
            plain.append(bench.timed(None, blocks))
            steps.append(bench.timed(blocks, blocks))
            copying.append(bench.load_seconds)
            submission.append(bench.submission)
        context.report.row(
            KERNEL,
            ring_slots=ring,
            requests=batch,
            share_of_link=share,
            blocks=blocks,
            ctas=ctas,
            step_ms=1e3 * middle(steps),
            slowdown=middle([a / b for a, b in zip(steps, plain, strict=True)]),
            GBps=blocks * bench.row_bytes / middle(copying) / 1e9 if middle(copying) else None,
            submission_ms=1e3 * middle(submission),
        )
    bench.longest_run = LONGEST_RUN
    bench.engine.use_gather(None, 0)


def small_copies(context: Context, bench: Bench, ring: int, share: float, blocks: int) -> None:
    """How long the inputs of a step wait for its loads and stores, by what is submitted first."""
    if not context.has_time(5, f"small copies beside {share:g} of the link"):
        return
    steps: dict[tuple[bool, bool], list[float]] = {way: [] for way in WAYS}
    copies: dict[tuple[bool, bool], list[float]] = {way: [] for way in WAYS}
    bench.use_inputs(True)
    for _ in range(bench.sizes.turns):
        for head_first, overlap in WAYS:
            bench.engine.submit_head_first(head_first)
            bench.engine.prefer_overlap(overlap)
            steps[head_first, overlap].append(bench.timed(blocks, blocks))
            copies[head_first, overlap] += bench.take_input_seconds()
    bench.use_inputs(False)
    bench.engine.submit_head_first(True)
    bench.engine.prefer_overlap(True)
    for (head_first, overlap), taken in copies.items():
        context.report.row(
            "small copies on the compute stream between a step's begin and its first gate",
            ring_slots=ring,
            share_of_link=share,
            blocks=blocks,
            head_first=head_first,
            prefer_overlap=overlap,
            copies=len(taken),
            median_us=1e6 * middle(taken),
            p99_us=1e6 * percentile(taken, 99),
            step_ms=1e3 * middle(steps[head_first, overlap]),
        )


class Bench:
    """Times runs of steps.

    Attributes:
        sizes: sizes of the stage.
        engine: engine that copies.
        row_bytes: bytes of a block in all layers.
        load_seconds: time that copies to the device took in the last run, for each step.
        submission: seconds of this thread for a step of the last run; beyond a step's time they
            are what steps wait for.
        stalls: seconds of those steps of the last run that were timed.
        stored_wrong: pages that were stored with other bytes, so far.
        longest_run: blocks of a plan's runs.
    """

    def __init__(
        self, engine: TransferEngine, compute: Compute, model: Model, sizes: Sizes
    ) -> None:
        self.sizes, self.row_bytes = sizes, engine.geometry.row_bytes
        self.load_seconds, self.submission, self.stored_wrong = 0.0, 0.0, 0
        self.stalls: list[float] = []
        self.longest_run = LONGEST_RUN
        self.engine, self._compute, self._model = engine, compute, model
        self._inputs = SmallCopies(compute)
        self._step = 0
        device = compute.device
        self._sets = [
            torch.arange(first, first + sizes.most_blocks, device=device)
            for first in (0, sizes.most_blocks)
        ]

    def use_inputs(self, on: bool) -> None:
        """Whether each step with a plan copies something small after its begin."""
        self._model.inputs = self._inputs if on else None

    def take_input_seconds(self) -> list[float]:
        """Seconds of each such copy since the last call."""
        return self._inputs.take_seconds()

    def timed(self, loads: int | None, blocks: int) -> float:
        """Seconds of a step: a mean over a run of them, by the compute's clock.

        Args:
            loads: blocks that each step loads, other rows than the step before; None is no plan.
            blocks: ring pages that are read.
        """
        count, compute, model = self.sizes.steps, self._compute, self._model
        wrong_before = model.wrong.clone()
        stats, copies = [], []
        # The engine times every fourth of its steps, so a run has as many as another.
        assert count % TIMED_EVERY == 0
        self._step += 1  # There were steps without a plan, perhaps.
        start, begin = compute.mark(), time.perf_counter()
        for index in range(count):
            rows = self._sets[index % 2][:blocks]
            plan = None
            if loads is not None:
                plan = self._plan(loads, index)
                copies.append((plan.stores, plan.step))
            found = model.step(plan, rows)
            if found is not None:
                stats.append(found)
        end = compute.mark()
        self.submission = (time.perf_counter() - begin) / count
        seconds = compute.seconds(start, end) / count
        if loads is None:
            compute.synchronize()
            model.wrong.copy_(wrong_before)  # Without loads the ring holds what it held.
            return seconds
        self.engine.drain()
        compute.synchronize()
        # The first step of the run stored what an earlier run had written.
        for stores, step in copies[-3:]:
            self.stored_wrong += model.wrong_stores(stores, step)
        self.load_seconds = sum(each.load_seconds for each in stats) / count
        self.stalls = [each.stall_seconds for each in stats if each.stall_step >= 0]
        return seconds

    def _plan(self, loads: int, index: int) -> StepPlan:
        """Loads of one set of rows, in runs as from several requests, and stores."""
        self._step += 1
        geometry = self.engine.geometry
        most, first_block = self.sizes.most_blocks, geometry.resident_blocks
        base, longest = most * (index % 2), self.longest_run
        loaded = [
            Copy(first_block + at, base + at, min(longest, loads - at))
            for at in range(0, loads, longest)
        ]
        stores = [Copy(1, 2 * most + WRITTEN * (self._step % 4), WRITTEN)]
        out, back = (runs(in_chunks(each, geometry.chunk_rows)) for each in (stores, loaded))
        return StepPlan(self._step, out, NO_RUNS, back, (), forward=True)

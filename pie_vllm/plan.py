"""The contract between scheduler and workers: data only.

With every step go ``StepOrders``, with every result comes a ``StepReport``: attributes named
``pie`` of vLLM's SchedulerOutput and ModelRunnerOutput. A prior goes once, from the workers at
start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pie_vllm.errors import IntegrityError

RETRY_SECONDS = 30.0
"""Seconds between a refusal of memory and the next attempt to take it."""


class Copy(NamedTuple):
    """Copy of ``count`` neighbouring blocks and rows: ``block + i`` and ``row + i``.

    A store copies KV from block to row, a load from row to block. A load's blocks are all pooled
    (ring pages, needed in this step only) or all resident (a promotion). No run crosses a chunk
    of the host pool.
    """

    block: int
    row: int
    count: int  # type: ignore[assignment]  # the word for it, over tuple.count


Runs = NDArray[np.int64]
"""Copies of a step: a C-contiguous array of shape (runs, 3), a ``Copy`` in each row.

Those of a plan are read-only, as several steps may share one array.
"""


def runs(copies: Iterable[Copy] = ()) -> Runs:
    """These copies as an array.

    Raises:
        IntegrityError: a number does not fit 64 bits.
    """
    try:
        found = np.array([*copies], np.int64).reshape(-1, 3)
    except OverflowError as error:
        raise IntegrityError(f"a run with a number that does not fit 64 bits: {error}") from error
    found.flags.writeable = False
    return found


NO_RUNS = runs()
"""What a plan copies that copies nothing."""


PACKED_BYTES_MAX = 1 << 16
"""Maximum number of bytes of runs that are copied into the pickled plan: copying them costs less
there than what an array has beside its bytes."""


def num_copied(copies: Runs) -> int:
    """Number of blocks that these runs copy."""
    return int(copies[:, 2].sum())


class Relabel(NamedTuple):
    """Blocks ``index .. index + len(blocks)`` of a request have new ids."""

    request_id: str
    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    blocks: tuple[int, ...]


_relabel: Callable[[tuple[Any, ...]], Relabel] = partial(tuple.__new__, Relabel)


class StepPlan(NamedTuple):
    """Work of one step, the same on every rank.

    Attributes:
        step: number of the scheduler's step, from 1; steps without a plan count too.
        stores: copies from resident pages to rows (demotions), before the step's KV writes.
        promotions: copies from rows to resident pages.
        loads: copies from rows to ring pages, for every pooled block that the step reads; None
            for the runs of the step before.
        relabels: changes of block tables, before the step's inputs are made.
        forward: whether the step runs the model (has scheduled tokens).
        pooled: number of pooled blocks in use when the plan was made.
        stores_first: whether the step's compute comes after all of its stores. It has to where a
            page with a store is written without a gate: by a layer of a group without a pool, by
            zeroing or by a copy on the device.
        after_all: whether the step's promotions and loads come after all compute submitted before
            it. They have to where layers without gates used a page that a promotion fills.
        stores_after_all: whether the step's stores do, too. They have to where layers without gates
            wrote a page that a store reads: a window or a state of a preempted request.
        promotions_first: whether the step's compute comes after all of its promotions. It has to
            where layers without gates read a page that a promotion fills.
    """

    step: int
    stores: Runs
    promotions: Runs
    loads: Runs | None
    relabels: tuple[Relabel, ...]
    forward: bool
    pooled: int = 0
    stores_first: bool = False
    after_all: bool = False
    stores_after_all: bool = False
    promotions_first: bool = False

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal, arrays in each of their numbers."""
        return isinstance(other, StepPlan) and all(map(_equal, self, other))

    def __ne__(self, other: object) -> bool:
        """As ``==``; a tuple's own would compare arrays as if they were numbers."""
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it as few plain objects, see ``packed``."""
        return _plan, self.packed()

    def packed(self) -> tuple[Any, ...]:
        """The arguments of ``_plan``: plain objects, each of which costs less than one of a class.

        A step's orders are pickled among much else, with cold caches: what they name and call
        costs several times what it costs in a loop.
        """
        step, stores, promotions, loads, relabels, *others = self
        arrays = None if loads is None else _packed(loads)
        return step, _packed(stores), _packed(promotions), arrays, [*map(tuple, relabels)], *others


def _packed(copies: Runs) -> bytes | Runs:
    """Runs as bytes, which cost less than a small array; a large one may travel by itself."""
    if copies is NO_RUNS:
        return b""
    return copies if copies.nbytes > PACKED_BYTES_MAX else copies.tobytes()


def _unpacked(copies: bytes | Runs) -> Runs:
    """Runs as they were before ``_packed``, and read-only."""
    if not isinstance(copies, bytes):
        return copies
    return np.frombuffer(copies, np.int64).reshape(-1, 3) if copies else NO_RUNS


def _plan(
    step: int,
    stores: bytes | Runs,
    promotions: bytes | Runs,
    loads: bytes | Runs | None,
    relabels: list[tuple[Any, ...]],
    *others: Any,
) -> StepPlan:
    """A plan as it was pickled."""
    return StepPlan(
        step,
        _unpacked(stores),
        _unpacked(promotions),
        None if loads is None else _unpacked(loads),
        tuple(map(_relabel, relabels)),
        *others,
    )


def _equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return type(one) is type(other) and one == other


class PoolOrder(NamedTuple):
    """Memory that the workers are to hold for the pool, sent with every step.

    Attributes:
        chunks: number of chunks, from the first on.
        idle: whether the workers may give back all chunks but the first once the idle time has
            passed, until an order says otherwise. The scheduler counts on none of them until it
            has asked for them again.
        number: number of orders so far that took back chunks or the leave to go idle.
    """

    chunks: int
    idle: bool = False
    number: int = 0


class PoolState(NamedTuple):
    """Memory that the workers hold for the pool, sent with every result.

    Attributes:
        chunks: number of chunks, from the first on, that all ranks hold and keep until an order
            of a higher number.
        refused: number of times that memory could not be had, over all ranks.
        number: number of the order that was followed.
        released: number of times that all chunks but the first were given back because the pool
            was idle.
    """

    chunks: int
    refused: int = 0
    number: int = 0
    released: int = 0


class Totals(NamedTuple):
    """Sums over all steps since the start, of one worker.

    Attributes:
        steps: number of steps with a plan.
        bytes_loaded: bytes copied from the CPU pool to the device, promotions included.
        bytes_stored: bytes copied from the device to the CPU pool.
        load_seconds, store_seconds: seconds during which the link was busy, per direction.
        stall_seconds: seconds during which the compute waited for a copy. A GPU measures some
            steps, each of which stands for the steps before it.
        gates: number of layers that passed their gate.
        pooled_peak: maximum number of pooled blocks in use in one step.
        bytes_finished: bytes of the loads that ``load_seconds`` covers; at most ``bytes_loaded``.
        stall_step: number of the newest step with a known stall; -1 without one.
        step_stall: stall of that step, in seconds.
        graph_steps: number of steps with a plan that ran in a FULL graph, copies inside.
    """

    steps: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    load_seconds: float = 0.0
    store_seconds: float = 0.0
    stall_seconds: float = 0.0
    gates: int = 0
    pooled_peak: int = 0
    bytes_finished: int = 0
    stall_step: int = -1
    step_stall: float = 0.0
    graph_steps: int = 0


class StepOrders(NamedTuple):
    """Attribute ``pie`` of a step's SchedulerOutput: what pie's workers do beside vLLM's.

    The scheduler keeps that output until the step's report comes, and reads the last three then.

    Attributes:
        plan: copies and relabels of the step; None if it has none.
        pool: chunks of the CPU pool that the workers are to hold from this step on.
        blocks: number of blocks that the step's requests have in use.
        within_budget: whether its loads were meant to hide behind its compute.
        restored: whether it copies parked KV back, which is then not computed.
    """

    plan: StepPlan | None
    pool: PoolOrder
    blocks: int = 0
    within_budget: bool = True
    restored: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle them as few plain objects, as ``StepPlan`` is: most steps have no plan."""
        plan = None if self.plan is None else self.plan.packed()
        return _orders, (plan, *self.pool, *self[2:])


def _orders(
    plan: tuple[Any, ...] | None, chunks: int, idle: bool, number: int, *others: Any
) -> StepOrders:
    """Orders as they were pickled."""
    found = None if plan is None else _plan(*plan)
    return StepOrders(found, PoolOrder(chunks, idle, number), *others)


class StepReport(NamedTuple):
    """Attribute ``pie`` of a step's ModelRunnerOutput: what became of the step.

    Attributes:
        totals: sums up to this step, taken when it was submitted.
        pool: chunks of the CPU pool that were held then.
        seconds: time of the forward pass; 0 if no model ran.
        failure: error text of the step's first failed copy; empty if none failed.
    """

    totals: Totals
    pool: PoolState
    seconds: float = 0.0
    failure: str = ""


class Prior(NamedTuple):
    """Measurements and settings that are known before the first step.

    Attributes:
        bandwidth: speed from the CPU to the device, bytes per second; None if unknown.
        most_bandwidth: upper bound on the speed that is counted on, bytes per second, whatever is
            measured; None if there is none.
        step_seconds: duration of a step that only decodes, without its attention; None if unknown.
            The first such step replaces it.
        attention_seconds: time that attention adds to it once the device is full of KV, in
            seconds; 0 if unknown.
        request_seconds: time that each further request adds to it; 0 if unknown.
        prompt_seconds: time that each prompt token adds to a step; 0 if unknown.
        limits_contention: whether the compute time that loads take counts as slowdown, beside the
            stall.
    """

    bandwidth: float | None = None
    most_bandwidth: float | None = None
    step_seconds: float | None = None
    attention_seconds: float = 0.0
    request_seconds: float = 0.0
    prompt_seconds: float = 0.0
    limits_contention: bool = True

    @property
    def full_step_seconds(self) -> float | None:
        """Duration of a step that only decodes, over a device full of KV; None if unknown."""
        return None if self.step_seconds is None else self.step_seconds + self.attention_seconds

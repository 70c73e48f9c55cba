"""The contract between scheduler and workers: data only.

With every step go a plan and an order for the pool's memory; with every result comes the pool's
state. A prior goes once, from the workers at start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

RETRY_SECONDS = 30.0
"""Between a refusal of memory and the next attempt to take it."""


class Copy(NamedTuple):
    """A run of ``count`` neighbouring blocks and rows: ``block + i`` and ``row + i``.

    In a store the KV goes from block to row, in a load from row to block. A
    load's blocks are all pooled (ring pages, needed in this step only) or all
    resident (a promotion). No run crosses a chunk of the host pool.
    """

    block: int
    row: int
    count: int  # type: ignore[assignment]  # the word for it, over tuple.count


def num_copied(copies: Iterable[Copy]) -> int:
    """Blocks that these runs move."""
    return sum(copy.count for copy in copies)


class Relabel(NamedTuple):
    """Blocks ``index .. index + len(blocks)`` of a request have new ids."""

    request_id: str
    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    blocks: tuple[int, ...]


class StepPlan(NamedTuple):
    """The work of one step, the same on every rank.

    Attributes:
        step: number of the scheduler's step, from 1; steps without a plan count too.
        stores: demotions: resident page to row, before the step's KV writes.
        promotions: row to resident page, once.
        loads: row to ring page of a pooled id, for every pooled block read.
            ``None`` means: the same runs as in the step before.
        relabels: changes of block tables, before the step's inputs are made.
        forward: whether the step runs the model (has scheduled tokens).
        pooled: pooled blocks in use when the plan was made.
    """

    step: int
    stores: tuple[Copy, ...]
    promotions: tuple[Copy, ...]
    loads: tuple[Copy, ...] | None
    relabels: tuple[Relabel, ...]
    forward: bool
    pooled: int = 0


class PoolOrder(NamedTuple):
    """What the workers are to hold, sent with every step.

    Attributes:
        chunks: of the pool, from the first on.
        idle: leave to give back all chunks but the first once the idle time has passed, until an
            order without leave. The scheduler counts on none of them until it has asked.
        number: count of the orders so far that took something back: chunks, or such a leave.
    """

    chunks: int
    idle: bool = False
    number: int = 0


class PoolState(NamedTuple):
    """What the workers hold, sent with every result.

    Attributes:
        chunks: from the first on, that all ranks hold and keep until an order of a higher number.
        refused: how often memory could not be had, on all ranks.
        number: of the order that was followed.
        released: how often all chunks but the first were given back by leave.
    """

    chunks: int
    refused: int = 0
    number: int = 0
    released: int = 0


class Prior(NamedTuple):
    """What is known before the first step.

    Attributes:
        bandwidth: from the CPU to the device, bytes per second; None if unknown.
        most_bandwidth: that is counted on, whatever is measured; None is without end.
        step_seconds: of a step that only decodes; None if unknown. The first such step replaces it.
        request_seconds: by which it is longer for each further request; 0 if unknown.
        prompt_seconds: of each prompt token; 0 if unknown.
        limits_contention: whether what loads take from the compute counts as slowdown, not the
            stall alone.
    """

    bandwidth: float | None = None
    most_bandwidth: float | None = None
    step_seconds: float | None = None
    request_seconds: float = 0.0
    prompt_seconds: float = 0.0
    limits_contention: bool = True

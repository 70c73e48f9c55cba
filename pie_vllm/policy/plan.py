"""What one engine step must store, load and relabel: data only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


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

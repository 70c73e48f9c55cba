"""Steps in flight, and what a failed copy of one of them leaves behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pie_vllm.plan import Copy, StepPlan
from pie_vllm.policy.block import Block, BlockId, RequestId, Row
from pie_vllm.policy.placement.residency import Residency

Starts = Callable[[], Mapping[RequestId, int]]
"""Gives the position of the first token that a step computes, for each of its requests."""


class SentStep(NamedTuple):
    """A step that was handed to the workers.

    Attributes:
        token: Object that stands for the step.
        number: Count of such steps, from 1.
        plan: Its plan; None if it copies nothing.
        readers: Its requests that have pooled blocks.
        starts: Positions at which its requests begin to compute.
    """

    token: object
    number: int
    plan: StepPlan | None
    readers: frozenset[RequestId]
    starts: Starts


class Cell(NamedTuple):
    """Where a block of a request is.

    Attributes:
        block_id: Its id.
        row: Its row; None if it is resident.
        key: Its key in the prefix cache; None if it is not cached.
    """

    block_id: BlockId
    row: Row | None
    key: Hashable | None


class Holding(NamedTuple):
    """The blocks of a request, or those that it gave back.

    Attributes:
        request_id: Id of the request.
        cells: Its blocks, in order.
        until: Number of the newest step in flight when it gave them back; None if it has them.
    """

    request_id: RequestId
    cells: Sequence[Cell]
    until: int | None = None


class Flight:
    """Knows the steps in flight, so that a failed one can be undone in the books.

    A step whose plan failed left unknown bytes in the rows that it stored to and in the pages
    that it filled, and its requests with pooled blocks read unknown bytes. What they computed from
    there on is wrong, in this step and in those behind it, and so is what others found of it in
    the prefix cache. ``failed`` follows all that and forgets it. Where a page or a key means two
    things in the course of the steps in flight, it forgets both, though one may be right.

    Between failures it costs a few references a step, and a look at the blocks of a request that
    gives them back while a step with a plan is in flight.
    """

    def __init__(self, residency: Residency, block_size: int) -> None:
        """Start with no step in flight; ``residency`` tells here who gives blocks back."""
        self._residency = residency
        self._block_size = block_size
        self._steps: deque[SentStep] = deque()
        self._left: list[Holding] = []
        self._number = 0
        residency.on_leave = self._leave

    def submitted(self, token: object, plan: StepPlan | None, starts: Starts) -> None:
        """A step was planned and goes to the workers; ``token`` stands for it."""
        self._number += 1
        readers: frozenset[RequestId] = frozenset()
        if plan is not None and plan.forward:
            readers = frozenset(self._residency.read_set.running)
        self._steps.append(SentStep(token, self._number, plan, readers, starts))

    def landed(self, token: object) -> None:
        """The results of a step are there, and of all before it."""
        steps = self._steps
        if steps and steps[0].token is token:
            steps.popleft()
        elif any(step.token is token for step in steps):
            while steps.popleft().token is not token:
                pass
        if self._left:
            first = steps[0].number if steps else self._number + 1
            self._left = [
                held for held in self._left if held.until is not None and held.until >= first
            ]

    def clear(self) -> None:
        """No result of any step will come any more."""
        self._steps.clear()
        self._left.clear()

    def _leave(self, request_id: RequestId) -> None:
        table = self._residency.tables.get(request_id)
        if table and any(step.plan is not None for step in self._steps):
            self._left.append(Holding(request_id, self._cells(table), self._number))

    def _cells(self, table: Sequence[Block]) -> list[Cell]:
        rows, cells = self._residency.rows, []
        for block in table:
            row = rows.row_of(block.block_id) if rows.holds(block.block_id) else None
            cells.append(Cell(block.block_id, row, block.block_hash))
        return cells

    def failed(self, token: object) -> dict[RequestId, int]:
        """Copies of a step failed: forget what it spoilt; before ``landed``.

        Nobody finds it in the prefix cache any more, and it is parked no more. The requests that
        have it, or had it, are the caller's to preempt.

        Returns:
            Number of first tokens with good KV, for each of these requests.
        """
        steps = [*self._steps]
        while steps and steps[0].token is not token:
            steps.pop(0)
        if not steps:
            return {}
        spoilt = _Spoilt(steps, self._block_size)
        tables = self._residency.tables
        holdings = [Holding(r, self._cells(table)) for r, table in tables.items() if table]
        while sum(map(spoilt.reaches, (*holdings, *self._left))):
            pass  # What one has, another may have found in the prefix cache.
        self._forget(spoilt)
        return spoilt.good

    def _forget(self, spoilt: _Spoilt) -> None:
        residency = self._residency
        for block, cell in zip(residency.blocks, self._cells(residency.blocks), strict=True):
            if spoilt.has(cell):
                residency.discard(block)
        residency.parking.forget(spoilt.keys, spoilt.rows, spoilt.good)
        residency.withhold()


class _Spoilt:
    """What is not to be trusted: pages and rows of copies, and keys of KV computed upon them.

    A block without a key is in the table of one request only.
    """

    def __init__(self, steps: Sequence[SentStep], block_size: int) -> None:
        """Take the copies of the first step, and follow them through those of the others."""
        first, *others = steps
        self._block_size = block_size
        self._readers = first.readers
        self._since: dict[RequestId, int] = {}
        for step in reversed(steps):
            self._since.update(step.starts())
        self.pages: set[int] = set()
        self.rows: set[int] = set()
        if first.plan is not None:
            self.rows.update(row for _, row in _pairs(first.plan.stores))
            self.pages.update(page for page, _ in _pairs(first.plan.promotions))
        for step in others:
            if step.plan is not None:
                stores, promotions = _pairs(step.plan.stores), _pairs(step.plan.promotions)
                self.rows.update(row for page, row in stores if page in self.pages)
                self.pages.update(page for page, row in promotions if row in self.rows)
        self.keys: set[Hashable] = set()
        self.good: dict[RequestId, int] = {}

    def has(self, cell: Cell) -> bool:
        """Whether a block is one of these, wherever it is."""
        return (
            cell.block_id in self.pages
            or cell.row in self.rows
            or (cell.key is not None and cell.key in self.keys)
        )

    def reaches(self, holding: Holding) -> bool:
        """Follow what a request computed upon such a block; whether that was news."""
        found = (index for index, cell in enumerate(holding.cells) if self.has(cell))
        first = next(found, None)
        name = holding.request_id
        since = self._since.get(name)
        if first is None and not (name in self._readers and since is not None):
            return False
        good = len(holding.cells) if first is None else first
        good *= self._block_size
        good = good if since is None else min(good, since)
        before = self.good.get(name)
        self.good[name] = good if before is None else min(good, before)
        known = len(self.keys)
        if since is not None:
            cells = holding.cells[since // self._block_size :]
            self.keys.update(cell.key for cell in cells if cell.key is not None)
        return self.good[name] != before or len(self.keys) > known


def _pairs(copies: Sequence[Copy]) -> Iterator[tuple[int, int]]:
    """Block and row of each block that these runs copy."""
    return ((block + i, row + i) for block, row, count in copies for i in range(count))

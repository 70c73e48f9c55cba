"""Steps in flight, and what a failed copy of one of them leaves behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pie_vllm.plan import Runs, StepPlan
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

    It is noted in columns: thousands of blocks are given back at once, and hardly ever looked at.

    Attributes:
        request_id: Id of the request.
        ids: Ids of its blocks, in order.
        keys: Key of each in the prefix cache; None for one that is not cached.
        rows: Row of each that is pooled, by id.
        until: Number of the newest step in flight when it gave them back; None if it has them.
        beside: Its cached blocks in groups without a pool, each with its key; none if it has them.
    """

    request_id: RequestId
    ids: Sequence[BlockId]
    keys: Sequence[Hashable | None]
    rows: Mapping[BlockId, Row]
    until: int | None = None
    beside: Sequence[tuple[Block, Hashable]] = ()

    def cells(self) -> list[Cell]:
        """Its blocks, in order."""
        row_of = self.rows.get
        return [Cell(i, row_of(i), key) for i, key in zip(self.ids, self.keys, strict=True)]


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
            held = self._holding(request_id, table, self._number)
            self._left.append(held._replace(beside=self._cached_beside(request_id)))

    def _cached_beside(self, request_id: RequestId) -> list[tuple[Block, Hashable]]:
        tables = (group.tables.get(request_id, ()) for group in self._residency.beside)
        return [(b, b.block_hash) for table in tables for b in table if b.block_hash is not None]

    def _holding(
        self, request_id: RequestId, table: Sequence[Block], until: int | None = None
    ) -> Holding:
        boundary, ledger = self._residency.boundary, self._residency.rows
        ids = [block.block_id for block in table]
        rows = {i: ledger.row_of(i) for i in ids if i >= boundary and ledger.holds(i)}
        return Holding(request_id, ids, [block.block_hash for block in table], rows, until)

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
        holdings = [self._holding(r, table) for r, table in tables.items() if table]
        followed = [(held.request_id, held.cells()) for held in (*holdings, *self._left)]
        while sum(spoilt.reaches(name, cells) for name, cells in followed):
            pass  # What one has, another may have found in the prefix cache.
        self._forget(spoilt)
        return spoilt.good

    def _forget(self, spoilt: _Spoilt) -> None:
        residency = self._residency
        cells = self._holding("", residency.blocks).cells()
        for block, cell in zip(residency.blocks, cells, strict=True):
            if spoilt.has(cell):
                residency.discard(block)
        # What they have in other groups upon wrong KV has keys of its own.
        beside = [pair for name in spoilt.good for pair in self._cached_beside(name)]
        for held in self._left:
            beside += held.beside if held.request_id in spoilt.good else ()
        for block, key in beside:
            if block.block_hash == key:
                residency.discard(block)
        residency.parking.forget_spoilt(spoilt.keys, spoilt.rows, spoilt.good)
        residency.supply.withhold()


class _Spoilt:
    """What is not to be trusted: pages and rows of copies, and keys of KV computed upon them.

    A block without a key is in the table of one request only.
    """

    def __init__(self, steps: Sequence[SentStep], block_size: int) -> None:
        """Take the copies of the first step, and follow them through those of the others."""
        first, *others = steps
        self._block_size = block_size
        self._readers = first.readers
        if first.plan is not None and first.plan.promotions_first:
            # Windows and states were filled, of requests that no table here tells.
            self._readers |= first.starts().keys()
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

    def reaches(self, name: RequestId, table: Sequence[Cell]) -> bool:
        """Follow what a request computed upon such a block; whether that was news."""
        found = (index for index, cell in enumerate(table) if self.has(cell))
        first = next(found, None)
        since = self._since.get(name)
        if first is None and not (name in self._readers and since is not None):
            return False
        good = len(table) if first is None else first
        good *= self._block_size
        good = good if since is None else min(good, since)
        before = self.good.get(name)
        self.good[name] = good if before is None else min(good, before)
        known = len(self.keys)
        if since is not None:
            cells = table[since // self._block_size :]
            self.keys.update(cell.key for cell in cells if cell.key is not None)
        return self.good[name] != before or len(self.keys) > known


def _pairs(copies: Runs) -> Iterator[tuple[int, int]]:
    """Block and row of each block that these runs copy."""
    return ((block + i, row + i) for block, row, count in copies.tolist() for i in range(count))

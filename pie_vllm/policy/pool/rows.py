"""Which rows of the CPU pool are taken: by a pooled block, or parked."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.block import BlockId, Row
from pie_vllm.policy.pool.extents import Extents, extent_of


class RowLedger:
    """Rows of the CPU pool. A row holds one block, that of a pooled id or a parked one.

    Rows and pooled ids are two numbers: there may be more rows than ids. Rows are handed out by
    extents (``pie_vllm.policy.pool.extents``), as ids are, so that blocks which follow each other
    have rows and ids that do, in one run. A parked row is taken and belongs to no
    id; who has parked it knows what it holds (``pie_vllm.policy.pool.parked_kv``).

    Attributes:
        extents: Which rows are taken, and for which places of chains.
        num_parked: rows that are taken and belong to no id.
    """

    def __init__(self, rows: int, first_block: int, chunk_rows: int | None = None) -> None:
        """Make a ledger of ``rows`` free rows for ids from ``first_block`` on.

        Args:
            rows: of the pool.
            first_block: the first pooled id.
            chunk_rows: rows of one chunk of the pool; None is one chunk.
        """
        self._first_block = first_block
        self._chunk_rows = chunk_rows or max(rows, 1)
        self._in_chunk = [0] * -(-rows // self._chunk_rows)
        self._chunks_held = 0
        self.extents = Extents(rows, extent_of(rows))
        self._parked = bytearray(rows)
        self._row_of: dict[int, Row] = {}
        self.num_parked = 0

    @property
    def usable(self) -> int:
        """Rows from here on are not handed out. Lower it to ``chunks_held`` chunks at most."""
        return self.extents.usable

    @usable.setter
    def usable(self, rows: int) -> None:
        self.extents.usable = rows

    @property
    def num_free(self) -> int:
        """Rows that are not taken."""
        return len(self._parked) - len(self._row_of) - self.num_parked

    @property
    def has_free(self) -> bool:
        """Whether a row may be handed out."""
        return self.extents.num_free > 0

    @property
    def chunks_held(self) -> int:
        """Chunks up to the last one in which a row is taken."""
        held = self._chunks_held
        while held and not self._in_chunk[held - 1]:
            held -= 1
        self._chunks_held = held
        return held

    def offers(self, place: int) -> bool:
        """Whether a place has a row of its own, or can have one in a free extent."""
        return self.extents.offers(place)

    def row_of(self, block: BlockId) -> Row:
        """The row of a pooled id. Raises KeyError when it has none."""
        return self._row_of[block]

    def holds(self, block: int) -> bool:
        """Whether the pooled id has a row."""
        return block in self._row_of

    def take(self, block: int, place: int | None = None) -> int:
        """Give a free row to a pooled id that has none, that of its place if it can be had."""
        self._check_without_row(block)
        row = self._take(block - self._first_block if place is None else place)
        if row is None:
            raise IntegrityError("no free row: more pooled ids are in use than rows may be")
        self._row_of[block] = Row(row)
        return row

    def take_at(self, blocks: Sequence[int], places: list[int | None]) -> list[int]:
        """As ``take`` for each of these, up to the first one whose place is offered no row.

        Returns:
            The rows of the first ones.
        """
        if not self._row_of.keys().isdisjoint(blocks):
            raise IntegrityError(f"one of the pooled blocks {[*blocks]} has a row already")
        rows = self._take_runs(places)
        self._row_of.update(zip(blocks, map(Row, rows), strict=False))
        return rows

    def release(self, block: int) -> int:
        """Take the row back from a pooled id; returns the row."""
        row = self._row_of.pop(block)
        self._give_back(row)
        return row

    def take_parked(self, place: int | None = None) -> int | None:
        """Take a free row for a block without an id, that of its place if it can be had.

        Returns:
            The row; None when none may be used.
        """
        row = self._take(place)
        if row is not None:
            self._parked[row] = 1
            self.num_parked += 1
        return row

    def take_parked_at(self, places: list[int | None]) -> list[int]:
        """As ``take_parked`` for each of these, up to the first place that is offered no row."""
        rows = self._take_runs(places)
        for row in rows:
            self._parked[row] = 1
        self.num_parked += len(rows)
        return rows

    def take_parked_spare(self, count: int) -> list[int]:
        """Take up to ``count`` free rows for blocks that belong to no place."""
        rows = self.extents.take_spares(count)
        for row in rows:
            self._note_taken(row, row)
            self._parked[row] = 1
        self.num_parked += len(rows)
        return rows

    def park(self, block: int) -> int:
        """The row of a pooled id stays taken and is parked; returns the row."""
        row = self._row_of.pop(block)
        self._parked[row] = 1
        self.num_parked += 1
        return row

    def adopt(self, block: int, row: int) -> None:
        """A parked row becomes that of a pooled id that has none."""
        self._check_without_row(block)
        self._check_parked(row)
        self._parked[row] = 0
        self.num_parked -= 1
        self._row_of[block] = Row(row)

    def free_parked(self, row: int) -> None:
        """A parked row is free."""
        self.free_all_parked((row,))

    def free_all_parked(self, rows: Sequence[int]) -> None:
        """``free_parked`` for each of these rows, which differ."""
        parked, in_chunk, size = self._parked, self._in_chunk, self._chunk_rows
        if not all(map(parked.__getitem__, rows)):
            deque(map(self._check_parked, rows), maxlen=0)
        for row in rows:
            parked[row] = 0
            in_chunk[row // size] -= 1
        self.num_parked -= len(rows)
        self.extents.give_all(rows)

    def _check_without_row(self, block: int) -> None:
        if block in self._row_of:
            raise IntegrityError(f"pooled block {block} has row {self._row_of[block]} already")

    def _check_parked(self, row: int) -> None:
        if not self._parked[row]:
            raise IntegrityError(f"row {row} is not parked")

    def _take(self, place: int | None) -> int | None:
        row = None if place is None else self.extents.take(place)
        if row is None:
            row = self.extents.take_spare()
        if row is not None:
            self._note_taken(row, row)
        return row

    def _take_runs(self, places: list[int | None]) -> list[int]:
        rows: list[int] = []
        for run in self.extents.take_runs(places):
            first, last = (run[0], run[-1]) if run.step > 0 else (run[-1], run[0])
            self._note_taken(first, last)
            rows += run
        return rows

    def _note_taken(self, first: int, last: int) -> None:
        """Count the rows from ``first`` to ``last`` in their chunks."""
        size, in_chunk = self._chunk_rows, self._in_chunk
        for chunk in range(first // size, last // size + 1):
            in_chunk[chunk] += min(last, chunk * size + size - 1) - max(first, chunk * size) + 1
        self._chunks_held = max(self._chunks_held, last // size + 1)

    def _give_back(self, row: int) -> None:
        self._in_chunk[row // self._chunk_rows] -= 1
        self.extents.give(row)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every row has at most one owner."""
        rows = list(self._row_of.values())
        if len(set(rows)) != len(rows):
            raise IntegrityError("two pooled blocks share a row")
        parked = [row for row, use in enumerate(self._parked) if use]
        if len(parked) != self.num_parked:
            raise IntegrityError("the count of parked rows is off")
        taken = rows + parked
        free = self.extents.free_slots()
        if len(set(taken)) != len(taken) or sorted(taken + free) != list(range(len(self._parked))):
            raise IntegrityError("taken rows differ from rows with an owner")
        held = {row // self._chunk_rows for row in taken}
        if self.chunks_held != max(held, default=-1) + 1:
            raise IntegrityError("the count of chunks with a taken row is off")
        if taken and max(taken) >= self.usable:
            raise IntegrityError("a row that may not be used is taken")
        self.extents.check_integrity()

"""Which rows of the CPU pool are taken: by a pooled block, or parked."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.block import BlockId, Row

_FREE, _POOLED, _PARKED = range(3)


class RowLedger:
    """Rows of the CPU pool. A row holds one block, that of a pooled id or a parked one.

    Rows and pooled ids are two numbers: there may be more rows than ids. A row
    is handed out next to the row of the neighbouring id where that is free, so
    that runs of ids are runs of rows. A parked row is taken and belongs to no
    id; who has parked it knows what it holds (``pie_vllm.policy.pool.parked_kv``).

    Attributes:
        usable: rows from here on are not handed out. Lower it to
            ``chunks_held`` chunks at most.
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
        self.usable = rows
        self._chunk_rows = chunk_rows or max(rows, 1)
        self._in_chunk = [0] * -(-rows // self._chunk_rows)
        self._chunks_held = 0
        self._free = list(range(rows))
        heapify(self._free)
        self._taken = bytearray(rows)
        self._row_of: dict[int, Row] = {}
        self.num_parked = 0

    @property
    def num_free(self) -> int:
        """Rows that are not taken."""
        return len(self._taken) - len(self._row_of) - self.num_parked

    @property
    def has_free(self) -> bool:
        """Whether a row may be handed out."""
        return self._peek() is not None

    @property
    def chunks_held(self) -> int:
        """Chunks up to the last one in which a row is taken."""
        held = self._chunks_held
        while held and not self._in_chunk[held - 1]:
            held -= 1
        self._chunks_held = held
        return held

    def row_of(self, block: BlockId) -> Row:
        """The row of a pooled id. Raises KeyError when it has none."""
        return self._row_of[block]

    def holds(self, block: int) -> bool:
        """Whether the pooled id has a row."""
        return block in self._row_of

    def take(self, block: int) -> int:
        """Give a free row to a pooled id that has none."""
        self._check_without_row(block)
        row = block - self._first_block
        before = self._row_of.get(block - 1)
        if before is not None and before + 1 < self.usable and not self._taken[before + 1]:
            row = before + 1
        elif row >= self.usable or self._taken[row]:
            lowest = self._lowest_free()
            if lowest is None:
                raise IntegrityError("no free row: more pooled ids are in use than rows may be")
            row = lowest
        self._mark(row, _POOLED)
        self._row_of[block] = Row(row)
        return row

    def release(self, block: int) -> int:
        """Take the row back from a pooled id; returns the row."""
        row = self._row_of.pop(block)
        self._give_back(row)
        return row

    def take_parked(self) -> int | None:
        """Take a free row for a block without an id; None when none may be used."""
        row = self._lowest_free()
        if row is not None:
            self._mark(row, _PARKED)
            self.num_parked += 1
        return row

    def park(self, block: int) -> int:
        """The row of a pooled id stays taken and is parked; returns the row."""
        row = self._row_of.pop(block)
        self._taken[row] = _PARKED
        self.num_parked += 1
        return row

    def adopt(self, block: int, row: int) -> None:
        """A parked row becomes that of a pooled id that has none."""
        self._check_without_row(block)
        self._check_parked(row)
        self._taken[row] = _POOLED
        self.num_parked -= 1
        self._row_of[block] = Row(row)

    def free_parked(self, row: int) -> None:
        """A parked row is free."""
        self._check_parked(row)
        self.num_parked -= 1
        self._give_back(row)

    def _check_without_row(self, block: int) -> None:
        if block in self._row_of:
            raise IntegrityError(f"pooled block {block} has row {self._row_of[block]} already")

    def _check_parked(self, row: int) -> None:
        if self._taken[row] != _PARKED:
            raise IntegrityError(f"row {row} is not parked")

    def _mark(self, row: int, use: int) -> None:
        self._taken[row] = use
        chunk = row // self._chunk_rows
        self._in_chunk[chunk] += 1
        if chunk >= self._chunks_held:
            self._chunks_held = chunk + 1

    def _give_back(self, row: int) -> None:
        self._taken[row] = _FREE
        self._in_chunk[row // self._chunk_rows] -= 1
        heappush(self._free, row)
        if len(self._free) > 2 * len(self._taken) + 64:
            self._free = [r for r in range(len(self._taken)) if not self._taken[r]]

    def _peek(self) -> int | None:
        """The lowest free row that may be used."""
        # Rows taken by preference stay in the heap until they surface here.
        while self._free and self._taken[self._free[0]]:
            heappop(self._free)
        return self._free[0] if self._free and self._free[0] < self.usable else None

    def _lowest_free(self) -> int | None:
        row = self._peek()
        if row is not None:
            heappop(self._free)
        return row

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every row has at most one owner."""
        rows = list(self._row_of.values())
        if len(set(rows)) != len(rows):
            raise IntegrityError("two pooled blocks share a row")
        pooled = [row for row, use in enumerate(self._taken) if use == _POOLED]
        if sorted(rows) != pooled:
            raise IntegrityError("taken rows differ from rows with an owner")
        parked = [row for row, use in enumerate(self._taken) if use == _PARKED]
        if len(parked) != self.num_parked:
            raise IntegrityError("the count of parked rows is off")
        taken = rows + parked
        held = {row // self._chunk_rows for row in taken}
        if self.chunks_held != max(held, default=-1) + 1:
            raise IntegrityError("the count of chunks with a taken row is off")
        if taken and max(taken) >= self.usable:
            raise IntegrityError("a row that may not be used is taken")
        free = {r for r in self._free if not self._taken[r]}
        if free != {r for r in range(len(self._taken)) if not self._taken[r]}:
            raise IntegrityError("a free row is missing from the heap")

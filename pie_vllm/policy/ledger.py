"""Which rows of the CPU pool are taken, and by which pooled block."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from pie_vllm.errors import IntegrityError


class RowLedger:
    """Rows of the CPU pool. A row holds one block and belongs to one pooled id.

    Rows and pooled ids are two numbers: there may be more rows than ids. A row
    is handed out next to the row of the neighbouring id where that is free, so
    that runs of ids are runs of rows.

    Attributes:
        usable: rows from here on are not handed out. Lower it to
            ``chunks_held`` chunks at most.
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
        self._row_of: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Rows without an owner."""
        return len(self._taken) - len(self._row_of)

    @property
    def chunks_held(self) -> int:
        """Chunks up to the last one in which a row is taken."""
        held = self._chunks_held
        while held and not self._in_chunk[held - 1]:
            held -= 1
        self._chunks_held = held
        return held

    def row_of(self, block: int) -> int:
        """The row of a pooled id. Raises KeyError when it has none."""
        return self._row_of[block]

    def holds(self, block: int) -> bool:
        """Whether the pooled id has a row."""
        return block in self._row_of

    def take(self, block: int) -> int:
        """Give a free row to a pooled id that has none."""
        if block in self._row_of:
            raise IntegrityError(f"pooled block {block} has row {self._row_of[block]} already")
        row = block - self._first_block
        before = self._row_of.get(block - 1)
        if before is not None and before + 1 < self.usable and not self._taken[before + 1]:
            row = before + 1
        elif row >= self.usable or self._taken[row]:
            row = self._lowest_free()
        self._taken[row] = 1
        chunk = row // self._chunk_rows
        self._in_chunk[chunk] += 1
        if chunk >= self._chunks_held:
            self._chunks_held = chunk + 1
        self._row_of[block] = row
        return row

    def _lowest_free(self) -> int:
        # Rows taken by preference stay in the heap until they surface here.
        while self._free:
            row = heappop(self._free)
            if self._taken[row]:
                continue
            if row < self.usable:
                return row
            heappush(self._free, row)
            break
        raise IntegrityError("no free row: more pooled ids are in use than rows may be")

    def release(self, block: int) -> int:
        """Take the row back from a pooled id; returns the row."""
        row = self._row_of.pop(block)
        self._taken[row] = 0
        self._in_chunk[row // self._chunk_rows] -= 1
        heappush(self._free, row)
        if len(self._free) > 2 * len(self._taken) + 64:
            self._free = [r for r in range(len(self._taken)) if not self._taken[r]]
        return row

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every row has at most one owner."""
        rows = list(self._row_of.values())
        if len(set(rows)) != len(rows):
            raise IntegrityError("two pooled blocks share a row")
        if sum(self._taken) != len(rows) or not all(self._taken[row] for row in rows):
            raise IntegrityError("taken rows differ from rows with an owner")
        held = {row // self._chunk_rows for row in rows}
        if self.chunks_held != max(held, default=-1) + 1:
            raise IntegrityError("the count of chunks with a taken row is off")
        if rows and max(rows) >= self.usable:
            raise IntegrityError("a row that may not be used is taken")
        free = {r for r in self._free if not self._taken[r]}
        if free != {r for r in range(len(self._taken)) if not self._taken[r]}:
            raise IntegrityError("a free row is missing from the heap")

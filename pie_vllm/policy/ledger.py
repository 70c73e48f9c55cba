"""Which rows of the CPU pool are taken, and by which pooled block."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from pie_vllm.errors import IntegrityError


class RowLedger:
    """Rows of the CPU pool. A row holds one block and belongs to one pooled id.

    Rows and pooled ids are two numbers: there may be more rows than ids. A row
    is handed out next to the row of the neighbouring id where that is free, so
    that runs of ids are runs of rows.
    """

    def __init__(self, rows: int, first_block: int) -> None:
        """Make a ledger of ``rows`` free rows for ids from ``first_block`` on."""
        self._first_block = first_block
        self._free = list(range(rows))
        heapify(self._free)
        self._taken = bytearray(rows)
        self._row_of: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Rows without an owner."""
        return len(self._taken) - len(self._row_of)

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
        if before is not None and before + 1 < len(self._taken) and not self._taken[before + 1]:
            row = before + 1
        elif row >= len(self._taken) or self._taken[row]:
            row = self._lowest_free()
        self._taken[row] = 1
        self._row_of[block] = row
        return row

    def _lowest_free(self) -> int:
        # Rows taken by preference stay in the heap until they surface here.
        while self._free:
            row = heappop(self._free)
            if not self._taken[row]:
                return row
        raise IntegrityError("no free row: the window may not be larger than the rows")

    def release(self, block: int) -> int:
        """Take the row back from a pooled id; returns the row."""
        row = self._row_of.pop(block)
        self._taken[row] = 0
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
        free = {r for r in self._free if not self._taken[r]}
        if free != {r for r in range(len(self._taken)) if not self._taken[r]}:
            raise IntegrityError("a free row is missing from the heap")

"""The copies that the coming step makes for parked KV, collected while it is planned."""

from __future__ import annotations

from collections.abc import Sequence

from pie_vllm.policy.pool.rows import RowLedger


class StepCopies:
    """Stores into rows of the pool, and restores out of them, of one step.

    A step does its stores first. A row that it restores from must therefore not get another use
    before its end: a parked block is pinned for that (``ParkedIndex.pin``), and a row that nobody
    needs after the restore is freed by ``take`` alone.

    Attributes:
        stores: resident id by row; demotions write theirs here, too.
        restores: row by resident id of the page that is filled.
        leaving: parked rows that are free once the step is planned.
        kept_pages: pages that are stored for tails with blocks of several groups.
        stores_beside: whether a store may read a page of a group of layers without a pool.
        fills_beside: whether a restore fills such a page.
        allowance: pages that may still be stored for parking in this step; None is without end.
        parked_blocks: number of blocks that were stored for parking since the start.
    """

    def __init__(self, rows: RowLedger) -> None:
        """Start without copies, for the rows of this ledger."""
        self._rows = rows
        self.stores: dict[int, int] = {}
        self.restores: dict[int, int] = {}
        self.leaving: set[int] = set()
        self.kept_pages: set[int] = set()
        self.stores_beside = self.fills_beside = False
        self.allowance: int | None = None
        self.parked_blocks = 0

    @property
    def pending(self) -> bool:
        """Whether ``take`` has something to do."""
        return bool(self.stores or self.restores or self.leaving or self.kept_pages)

    def store_parked(self, row: int, resident: int) -> None:
        """Have a resident page stored to a parked row, for which the allowance gets smaller."""
        self.stores[row] = resident
        self.parked_blocks += 1
        if self.allowance is not None:
            self.allowance -= 1

    def store_all_parked(self, rows: Sequence[int], residents: Sequence[int]) -> None:
        """``store_parked`` for each of these rows and pages."""
        self.stores.update(zip(rows, residents, strict=True))
        self.parked_blocks += len(rows)
        if self.allowance is not None:
            self.allowance -= len(rows)

    def free(self, row: int) -> None:
        """Free a parked row at once; nothing is stored there."""
        self.stores.pop(row, None)
        self._rows.free_parked(row)

    def free_all(self, rows: Sequence[int]) -> None:
        """``free`` for each of these rows."""
        if not self.stores.keys().isdisjoint(rows):
            for row in rows:
                self.stores.pop(row, None)
        self._rows.free_all_parked(rows)

    def free_leaving(self) -> None:
        """Free the rows that were kept for restores."""
        self._rows.free_all_parked([*self.leaving])
        self.leaving.clear()

    def take(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The stores and the restores as pairs of resident id and row; none is left."""
        stores = [*zip(self.stores.values(), self.stores, strict=True)]
        restores = [*self.restores.items()]
        self.stores.clear()
        self.restores.clear()
        self.kept_pages.clear()
        self.stores_beside = self.fills_beside = False
        self.free_leaving()
        return stores, restores

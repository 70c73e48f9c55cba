"""Sets of blocks kept as merged runs, changed one block at a time."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Collection, Iterable

from pie_vllm.errors import IntegrityError
from pie_vllm.plan import Copy
from pie_vllm.policy.block import BlockId, Row


class RunSet:
    """Blocks with their rows, as the fewest runs ``Copy(block, row, count)``.

    Two neighbours merge when their blocks follow each other, their rows follow
    each other and both rows lie in one chunk. Adding or removing one block
    costs ``O(log n)`` comparisons and a short list move; ``runs()`` costs
    ``O(runs)`` after a change and nothing otherwise.
    """

    def __init__(self, chunk_rows: int) -> None:
        """Start empty; ``chunk_rows`` is the number of rows of a pool's chunk."""
        self._chunk_rows = chunk_rows
        self._starts: list[int] = []
        self._runs: dict[int, Copy] = {}
        self._rows: dict[int, int] = {}
        self._emitted: tuple[Copy, ...] | None = ()

    def __len__(self) -> int:
        """Number of blocks in the set."""
        return len(self._rows)

    def __contains__(self, block: int) -> bool:
        return block in self._rows

    def _joined(self, block: int) -> bool:
        """Whether ``block`` belongs to the same run as the block before it."""
        row = self._rows.get(block)
        before = self._rows.get(block - 1)
        return (
            row is not None
            and before is not None
            and row == before + 1
            and row % self._chunk_rows != 0
        )

    def _put(self, run: Copy) -> None:
        if run.block not in self._runs:
            insort(self._starts, run.block)
        self._runs[run.block] = run

    def _drop(self, start: int) -> Copy:
        self._starts.pop(bisect_right(self._starts, start) - 1)
        return self._runs.pop(start)

    def add(self, block: BlockId, row: Row) -> None:
        """Add a block that is not in the set."""
        if block in self._rows:
            raise IntegrityError(f"block {block} is in the run set already")
        self._rows[block] = row
        self._emitted = None
        start: int = block
        count = 1
        if self._joined(block):
            start = self._starts[bisect_right(self._starts, block) - 1]
            count += self._drop(start).count
        if self._joined(block + 1):
            count += self._drop(block + 1).count
        self._put(Copy(start, self._rows[start], count))

    def remove(self, block: BlockId) -> None:
        """Remove a block that is in the set."""
        start = self._starts[bisect_right(self._starts, block) - 1]
        run = self._drop(start)
        del self._rows[block]
        self._emitted = None
        left = block - start
        if left:
            self._put(Copy(start, run.row, left))
        right = run.count - left - 1
        if right:
            self._put(Copy(block + 1, run.row + left + 1, right))

    def change(self, removed: Collection[BlockId], added: Collection[tuple[BlockId, Row]]) -> None:
        """Remove blocks that are in the set, then add blocks with their rows.

        Equals ``remove`` and ``add`` one by one. Many at once are merged anew, which costs less
        per block.
        """
        if 4 * (len(removed) + len(added)) < len(self._rows):
            for block in removed:
                self.remove(block)
            for block, row in added:
                self.add(block, row)
            return
        for block in removed:
            del self._rows[block]
        self._rows.update(added)
        self._emitted = merge(self._rows.items(), self._chunk_rows)
        self._runs = {run.block: run for run in self._emitted}
        self._starts = list(self._runs)

    def runs(self) -> tuple[Copy, ...]:
        """All runs, in the order of their blocks."""
        if self._emitted is None:
            self._emitted = tuple(map(self._runs.__getitem__, self._starts))
        return self._emitted

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the runs are exactly the merged blocks."""
        if merge(self._rows.items(), self._chunk_rows) != tuple(
            self._runs[start] for start in self._starts
        ):
            raise IntegrityError("runs differ from the blocks they stand for")


def merge(pairs: Iterable[tuple[int, int]], chunk_rows: int) -> tuple[Copy, ...]:
    """Merge ``(block, row)`` pairs into the fewest runs, in order of block."""
    runs: list[Copy] = []
    first = first_row = count = 0
    for block, row in sorted(pairs):
        if count and block == first + count and row == first_row + count and row % chunk_rows:
            count += 1
            continue
        if count:
            runs.append(Copy(first, first_row, count))
        first, first_row, count = block, row, 1
    if count:
        runs.append(Copy(first, first_row, count))
    return tuple(runs)

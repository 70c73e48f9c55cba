"""Sets of blocks kept as merged runs, changed one by one or many at once."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pie_vllm.errors import IntegrityError
from pie_vllm.plan import NO_RUNS, Runs
from pie_vllm.policy.block import BlockId, Row

FEW = 512
"""Number of pairs below which merging them one by one is faster than by arrays, whose code is
mostly not in the processor's caches."""


class RunSet:
    """Blocks of a range with their rows, as the fewest runs, see ``plan.Runs``.

    Two neighbours merge when their blocks follow each other, their rows follow each other and both
    rows lie in one chunk. Each block of the range has a flag that says whether it is in the set
    and one that says whether its row follows that of the block before it. So a change costs what it
    changes, and ``runs()`` costs a pass over these bytes and the runs after a change, and nothing
    otherwise.
    """

    def __init__(self, first: int, size: int, chunk_rows: int) -> None:
        """Start empty.

        Args:
            first: The range's first block.
            size: Number of blocks in the range.
            chunk_rows: Number of rows of a pool's chunk.
        """
        self._chunk_rows = chunk_rows
        # An entry before the first block and one after the last save comparisons with the ends.
        self._base = first - 1
        self._inside = np.zeros(size + 2, np.bool_)
        self._follows = np.zeros(size + 2, np.bool_)
        self._row = np.zeros(size + 2, np.int64)
        # Single entries of an array are read and written faster through a view of its memory.
        self._inside_at = self._inside.data
        self._follows_at = self._follows.data
        self._row_at = self._row.data
        self._count = 0
        self._emitted: Runs | None = NO_RUNS

    def __len__(self) -> int:
        """Number of blocks in the set."""
        return self._count

    def place(self, block: BlockId, row: Row) -> None:
        """Note the row of a block. That of a block in the set does not change."""
        at = block - self._base
        if row == self._row_at[at]:
            return
        if self._inside_at[at]:
            raise IntegrityError(f"block {block} in the run set has row {self._row_at[at]}")
        self._row_at[at] = row
        for near in (at, at + 1):
            here = self._row_at[near]
            self._follows_at[near] = bool(
                here == self._row_at[near - 1] + 1 and here % self._chunk_rows
            )

    def place_all(self, blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """``place`` for each of these blocks, which differ."""
        at = blocks - self._base
        moved = self._inside[at] & (self._row[at] != rows)
        if moved.any():
            raise IntegrityError(f"blocks {blocks[moved]} in the run set have other rows")
        self._row[at] = rows
        near = np.concatenate((at, at + 1))
        here = self._row[near]
        self._follows[near] = (here == self._row[near - 1] + 1) & (here % self._chunk_rows != 0)

    def add(self, block: BlockId) -> None:
        """Add a block that is not in the set; its row was noted."""
        at = block - self._base
        if self._inside_at[at]:
            raise IntegrityError(f"block {block} is in the run set already")
        self._inside_at[at] = True
        self._count += 1
        self._emitted = None

    def remove(self, block: BlockId) -> None:
        """Remove a block that is in the set."""
        at = block - self._base
        if not self._inside_at[at]:
            raise IntegrityError(f"block {block} is not in the run set")
        self._inside_at[at] = False
        self._count -= 1
        self._emitted = None

    def change(self, blocks: NDArray[np.int64], inside: NDArray[np.bool_]) -> None:
        """Add and remove many blocks, in the set or not; their rows were noted.

        Args:
            blocks: Blocks of the range; one that is named twice has the same value twice.
            inside: Whether each of them is in the set from now on.
        """
        at = blocks - self._base
        if np.array_equal(self._inside[at], inside):
            return
        self._inside[at] = inside
        self._count = int(np.count_nonzero(self._inside))
        self._emitted = None

    def runs(self) -> Runs:
        """All runs, in the order of their blocks; the same array until the next change."""
        if self._emitted is None:
            self._emitted = self._build()
        return self._emitted

    def _build(self) -> Runs:
        inside = self._inside
        joined = inside[:-1] & inside[1:]
        joined &= self._follows[1:]
        starts = (inside[1:] > joined).nonzero()[0]
        ends = (inside[:-1] > joined).nonzero()[0]
        found = np.empty((len(starts), 3), np.int64)
        starts += 1
        np.add(starts, self._base, out=found[:, 0])
        found[:, 1] = self._row[starts]
        np.subtract(ends, starts, out=found[:, 2])
        found[:, 2] += 1
        found.flags.writeable = False
        return found

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the runs are exactly the merged blocks."""
        at = self._inside.nonzero()[0]
        pairs = zip((at + self._base).tolist(), self._row[at].tolist(), strict=True)
        wanted = merge([*pairs], self._chunk_rows)
        if not (np.array_equal(self.runs(), wanted) and np.array_equal(self._build(), wanted)):
            raise IntegrityError("runs differ from the blocks they stand for")
        if len(at) != self._count:
            raise IntegrityError(f"{len(at)} blocks in a run set that counts {self._count}")


def merge(pairs: Collection[tuple[int, int]], chunk_rows: int) -> Runs:
    """Merge ``(block, row)`` pairs into the fewest runs, in order of block."""
    if not pairs:
        return NO_RUNS
    found = (_merged_few if len(pairs) < FEW else _merged_many)(pairs, chunk_rows)
    found.flags.writeable = False
    return found


def _merged_few(pairs: Collection[tuple[int, int]], chunk_rows: int) -> Runs:
    flat: list[int] = []
    first = first_row = count = 0
    for block, row in sorted(pairs):
        if count and block == first + count and row == first_row + count and row % chunk_rows:
            count += 1
            continue
        if count:
            flat += (first, first_row, count)
        first, first_row, count = block, row, 1
    flat += (first, first_row, count)
    return np.array(flat, np.int64).reshape(-1, 3)


def _merged_many(pairs: Collection[tuple[int, int]], chunk_rows: int) -> Runs:
    flat = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(pairs))
    order = flat[::2].argsort()
    blocks, rows = flat[::2][order], flat[1::2][order]
    # ``np.diff`` and ``np.concatenate`` take longer than the sums themselves.
    begins = np.ones(len(pairs) + 1, np.bool_)
    begins[1:-1] = blocks[1:] - blocks[:-1] != 1
    begins[1:-1] |= rows[1:] - rows[:-1] != 1
    begins[1:-1] |= rows[1:] % chunk_rows == 0
    starts = begins.nonzero()[0]
    found = np.empty((len(starts) - 1, 3), np.int64)
    found[:, 0] = blocks[starts[:-1]]
    found[:, 1] = rows[starts[:-1]]
    found[:, 2] = starts[1:] - starts[:-1]
    return found

"""Pooled blocks that the requests of a step read, kept from step to step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pie_vllm.errors import IntegrityError
from pie_vllm.plan import NO_RUNS, Runs
from pie_vllm.policy.block import BlockId, RequestId
from pie_vllm.policy.placement.run_set import RunSet
from pie_vllm.policy.pool.rows import RowLedger

FEW_CHANGED = 8
"""Number of blocks below which adding or removing them one by one is faster than by arrays."""

_NOTHING = np.empty(0, np.int64)


class ReadSet:
    """Pooled blocks of each request, and those that the current step must load.

    Costs follow change: a step in which the same requests run over the same blocks costs one set
    difference over the requests that have pooled blocks. Requests that are left out or come back
    cost array operations over their own blocks.

    Attributes:
        by_request: Pooled blocks of each request that has any; read only.
    """

    def __init__(self, rows: RowLedger, first: int, window: int, chunk_rows: int) -> None:
        """Start with no pooled block.

        Args:
            rows: Ledger of the pool's rows.
            first: The first pooled id.
            window: Number of pooled ids.
            chunk_rows: Number of rows of a pool's chunk.
        """
        self._rows = rows
        self._first = first
        self.by_request: dict[RequestId, set[BlockId]] = {}
        self._running: set[RequestId] = set()
        # By pooled id: number of running requests that read the block.
        self._readers = np.zeros(window, np.int64)
        self._readers_at = self._readers.data
        self._ids: dict[RequestId, NDArray[np.int64]] = {}
        self._loads = RunSet(first, window, chunk_rows)
        self._sent: Runs | None = NO_RUNS

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the step loads; a shared one counts once."""
        return len(self._loads)

    @property
    def running(self) -> Collection[RequestId]:
        """Requests that ran in the last step followed and have pooled blocks; read only."""
        return self._running

    def pooled(self, request_id: RequestId) -> Collection[BlockId]:
        """Pooled blocks of a request."""
        return self.by_request.get(request_id, ())

    def is_running(self, request_id: RequestId) -> bool:
        """Whether the request ran in the last step followed and has pooled blocks."""
        return request_id in self._running

    def add(self, request_id: RequestId, block_id: BlockId) -> None:
        """A block of the request is pooled now; it has a row."""
        blocks = self.by_request.setdefault(request_id, set())
        if block_id not in blocks:
            blocks.add(block_id)
            self._loads.place(block_id, self._rows.row_of(block_id))
            self._ids.pop(request_id, None)
            if request_id in self._running:
                self._read(block_id)

    def add_all(self, request_id: RequestId, block_ids: Sequence[BlockId]) -> None:
        """``add`` for each of these blocks, which differ."""
        if len(block_ids) < FEW_CHANGED:
            for block_id in block_ids:
                self.add(request_id, block_id)
            return
        blocks = self.by_request.setdefault(request_id, set())
        new = [block_id for block_id in block_ids if block_id not in blocks]
        blocks.update(new)
        ids = np.array(new, np.int64)
        rows = np.fromiter(map(self._rows.row_of, new), np.int64, len(new))
        self._loads.place_all(ids, rows)
        self._ids.pop(request_id, None)
        if request_id in self._running:
            self._readers[ids - self._first] += 1
            self._loads.change(ids, np.ones(len(ids), np.bool_))

    def discard(self, request_id: RequestId, block_id: BlockId) -> None:
        """A block of the request is not pooled any more."""
        blocks = self.by_request[request_id]
        blocks.remove(block_id)
        self._ids.pop(request_id, None)
        if request_id in self._running:
            self._unread(block_id)
        if not blocks:
            del self.by_request[request_id]
            self._running.discard(request_id)

    def discard_all(self, request_id: RequestId, block_ids: Sequence[BlockId]) -> None:
        """``discard`` for each of these blocks, which differ."""
        if len(block_ids) < FEW_CHANGED:
            for block_id in block_ids:
                self.discard(request_id, block_id)
            return
        blocks = self.by_request[request_id]
        blocks.difference_update(block_ids)
        self._ids.pop(request_id, None)
        if request_id in self._running:
            ids = np.array(block_ids, np.int64)
            self._readers[ids - self._first] -= 1
            self._loads.change(ids, self._readers[ids - self._first] > 0)
        if not blocks:
            del self.by_request[request_id]
            self._running.discard(request_id)

    def forget(self, request_id: RequestId) -> None:
        """The request gives its blocks back."""
        if request_id in self._running:
            self._running.remove(request_id)
            self._change([request_id], [])
        if self.by_request.pop(request_id, None):
            self._ids.pop(request_id, None)

    def follow(self, scheduled: Mapping[RequestId, Any], everyone: bool = False) -> None:
        """Make the blocks to load those of the scheduled requests.

        Args:
            scheduled: Requests that run in this step, by id.
            everyone: Whether these are all requests, which saves a comparison.
        """
        if len(self._running) == len(self.by_request) and (
            everyone or self._running <= scheduled.keys()
        ):
            return
        gone = [r for r in self._running if r not in scheduled]
        come = [r for r in self.by_request.keys() - self._running if r in scheduled]
        if gone or come:
            self._running.difference_update(gone)
            self._running.update(come)
            self._change(gone, come)

    def take(self) -> Runs | None:
        """Merged runs to load; None when they are those taken last."""
        runs = self._loads.runs()
        if runs is self._sent:
            return None
        self._sent = runs
        return runs

    def send_again(self) -> None:
        """Have the next ``take`` return the runs, though they may be those taken last."""
        self._sent = None

    def _change(self, gone: Iterable[RequestId], come: Iterable[RequestId]) -> None:
        """Some requests do not read their blocks any more, others read theirs from now on."""
        left, taken = self._places(gone), self._places(come)
        np.subtract.at(self._readers, left, 1)  # A shared block occurs once for each request.
        np.add.at(self._readers, taken, 1)
        changed = np.concatenate((left, taken))
        self._loads.change(changed + self._first, self._readers[changed] > 0)

    def _places(self, requests: Iterable[RequestId]) -> NDArray[np.int64]:
        """Pooled ids of these requests, counted from the first one; shared ones several times."""
        found = [_NOTHING]
        for request_id in requests:
            ids = self._ids.get(request_id)
            if ids is None:
                blocks = self.by_request[request_id]
                ids = np.fromiter(blocks, np.int64, len(blocks)) - self._first
                self._ids[request_id] = ids
            found.append(ids)
        return np.concatenate(found)

    def _read(self, block_id: BlockId) -> None:
        at = block_id - self._first
        if not self._readers_at[at]:
            self._loads.add(block_id)
        self._readers_at[at] += 1

    def _unread(self, block_id: BlockId) -> None:
        at = block_id - self._first
        self._readers_at[at] -= 1
        if not self._readers_at[at]:
            self._loads.remove(block_id)

    def check_integrity(self, tables: dict[RequestId, set[BlockId]]) -> None:
        """Raise IntegrityError unless the books agree with the requests' pooled ids."""
        self._loads.check_integrity()
        if {r: ids for r, ids in tables.items() if ids} != self.by_request:
            raise IntegrityError("pooled blocks of the requests disagree with their tables")
        readers = Counter(b for r in self._running for b in self.by_request[r])
        found = self._readers.nonzero()[0]
        counted = zip((found + self._first).tolist(), self._readers[found].tolist(), strict=True)
        if dict(counted) != readers or len(readers) != len(self._loads):
            raise IntegrityError("readers of pooled blocks disagree")
        for request_id, ids in self._ids.items():
            if {*(ids + self._first).tolist()} != self.by_request.get(request_id):
                raise IntegrityError(f"{request_id}: pooled ids are not those of its blocks")

"""Pooled blocks that the requests of a step read, kept from step to step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from pie_vllm.errors import IntegrityError
from pie_vllm.plan import Copy
from pie_vllm.policy.block import BlockId, RequestId
from pie_vllm.policy.placement.run_set import RunSet
from pie_vllm.policy.pool.rows import RowLedger


class ReadSet:
    """Pooled blocks of each request, and those that the current step must load.

    Costs follow change: a step in which the same requests run over the same
    blocks costs one set difference over the requests that have pooled blocks.

    Attributes:
        by_request: Pooled blocks of each request that has any; read only.
        readers: Number of readers of each block that the step loads; read only.
    """

    def __init__(self, rows: RowLedger, chunk_rows: int) -> None:
        """Start with no pooled block; ``chunk_rows`` is the number of rows of a pool's chunk."""
        self._rows = rows
        self.by_request: dict[RequestId, set[BlockId]] = {}
        self._running: set[RequestId] = set()
        self.readers: dict[BlockId, int] = {}
        self._loads = RunSet(chunk_rows)
        self._sent: tuple[Copy, ...] | None = ()

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the step loads; a shared one counts once."""
        return len(self.readers)

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
            if request_id in self._running:
                self._read(block_id)

    def discard(self, request_id: RequestId, block_id: BlockId) -> None:
        """A block of the request is not pooled any more."""
        blocks = self.by_request[request_id]
        blocks.remove(block_id)
        if request_id in self._running:
            self._unread(block_id)
        if not blocks:
            del self.by_request[request_id]
            self._running.discard(request_id)

    def forget(self, request_id: RequestId) -> None:
        """The request gives its blocks back."""
        blocks = self.by_request.pop(request_id, None)
        if blocks and request_id in self._running:
            self._running.remove(request_id)
            for block_id in blocks:
                self._unread(block_id)

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
        running, pooled, readers = self._running, self.by_request, self.readers
        gone: list[BlockId] = []
        new: list[BlockId] = []
        for request_id in [r for r in running if r not in scheduled]:
            running.remove(request_id)
            for block_id in pooled[request_id]:
                readers[block_id] -= 1
                if not readers[block_id]:
                    del readers[block_id]
                    gone.append(block_id)
        for request_id in pooled.keys() - running:
            if request_id in scheduled:
                running.add(request_id)
                for block_id in pooled[request_id]:
                    count = readers.get(block_id, 0)
                    readers[block_id] = count + 1
                    if not count:
                        new.append(block_id)
        if gone or new:
            row_of = self._rows.row_of
            self._loads.change(gone, [(block_id, row_of(block_id)) for block_id in new])

    def take(self) -> tuple[Copy, ...] | None:
        """Merged runs to load; None when they are those taken last."""
        runs = self._loads.runs()
        if runs is self._sent:
            return None
        self._sent = runs
        return runs

    def send_again(self) -> None:
        """Have the next ``take`` return the runs, though they may be those taken last."""
        self._sent = None

    def _read(self, block_id: BlockId) -> None:
        readers = self.readers.get(block_id, 0)
        self.readers[block_id] = readers + 1
        if not readers:
            self._loads.add(block_id, self._rows.row_of(block_id))

    def _unread(self, block_id: BlockId) -> None:
        readers = self.readers[block_id] - 1
        if readers:
            self.readers[block_id] = readers
        else:
            del self.readers[block_id]
            self._loads.remove(block_id)

    def check_integrity(self, tables: dict[RequestId, set[BlockId]]) -> None:
        """Raise IntegrityError unless the books agree with the requests' pooled ids."""
        self._loads.check_integrity()
        if {r: ids for r, ids in tables.items() if ids} != self.by_request:
            raise IntegrityError("pooled blocks of the requests disagree with their tables")
        readers = Counter(b for r in self._running for b in self.by_request[r])
        if dict(readers) != self.readers or len(readers) != len(self._loads):
            raise IntegrityError("readers of pooled blocks disagree")

"""Rows whose CPU memory is there, and pooled ids that are kept back for want of rows."""

from __future__ import annotations

from pie_vllm.geometry import Geometry
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.policy.pool.parked_kv import Parking
from pie_vllm.policy.pool.rows import RowLedger


class RowSupply:
    """Keeps the free queue from handing out pooled ids for which there is no row.

    Rows are there as far as the pool has grown, and pooled blocks cannot have those that parked KV
    holds until the step ends (``Parking.held``).

    Attributes:
        chunks_usable: Number of chunks of the pool whose rows are handed out.
        chunks_expected: Number of chunks whose rows an admission may count on.
    """

    def __init__(
        self, geometry: Geometry, rows: RowLedger, queue: TieredFreeBlockQueue, parking: Parking
    ) -> None:
        """Start with all rows there."""
        self._geometry, self._rows, self._queue, self._parking = geometry, rows, queue, parking
        self._window = geometry.pooled_blocks
        self.chunks_usable = self.chunks_expected = geometry.num_chunks

    def use_chunks(self, chunks: int, expected: int | None = None) -> None:
        """Hand out rows of the first ``chunks`` chunks only, at least ``rows.chunks_held``.

        Args:
            chunks: Number of chunks whose rows are there.
            expected: Number of chunks that will be there soon; None for no more than those.
        """
        self.chunks_usable = chunks
        self.chunks_expected = chunks if expected is None else max(chunks, expected)
        self._rows.usable = min(chunks * self._geometry.chunk_rows, self._geometry.rows)
        self.withhold()

    def withhold(self) -> None:
        """Keep back pooled ids for which there is no row."""
        geometry, queue, held = self._geometry, self._queue, self._parking.held
        coming = min(self.chunks_expected * geometry.chunk_rows, geometry.rows)
        withheld = max(0, self._window - self._rows.usable + held)
        queue.missing = max(0, self._window - coming + held)
        if withheld != queue.withheld:
            queue.withheld = withheld
            queue.refresh()

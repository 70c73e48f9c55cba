"""Where blocks live: which are demoted, which promoted, and what a step loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.plan import Copy, StepPlan
from pie_vllm.policy.placement.demotion import make_free
from pie_vllm.policy.placement.free_queue import FreeList, TieredFreeBlockQueue
from pie_vllm.policy.placement.interfaces import PrefixEntries
from pie_vllm.policy.placement.promotion import promote_free
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.placement.relabel_log import RelabelLog
from pie_vllm.policy.placement.run_set import merge
from pie_vllm.policy.placement.store_ahead import LOOK_STEPS, Ahead, write_through
from pie_vllm.policy.placement.victims import Victims
from pie_vllm.policy.pool.parked_kv import Parking
from pie_vllm.policy.pool.rows import RowLedger

MOST_HELD = 0.2
"""Share of the residents that requests waiting for the link may hold."""


class Residency:
    """Decides the tier of every block in use and builds the plan of each step.

    It changes block tables (lists of blocks, one per request) in place, and
    prefix-cache entries with them; it owns no bytes. A step is: ``begin_step``;
    vLLM's ``schedule``, during which allocations call back and demote;
    ``end_step``, which returns the plan.

    Attributes:
        geometry: the sizes.
        queue: the free blocks of both tiers, in place of vLLM's free queue.
        entries: of blocks in the prefix cache.
        rows: the ledger of the CPU pool's rows.
        parking: keeps KV that no request uses in rows beyond those of pooled blocks.
        boundary: ids below it are resident.
        window: pooled ids in all.
        chunks_usable: of the pool, whose rows are handed out; see ``use_chunks``.
        chunks_expected: of the pool, whose rows whoever is admitted may count on.
        demoted: whether a block was demoted in the step that is planned.
        demotions, promotions: counts since the start.
        catch_up: called before a demotion; tells of blocks that are complete by then.
        on_leave: called with a request that is about to give its blocks back.
    """

    def __init__(
        self,
        geometry: Geometry,
        blocks: Sequence[Any],
        make_list: Callable[[list[Any]], FreeList],
        tables: Mapping[str, list[Any]],
        entries: PrefixEntries,
        parking: str | None = None,
    ) -> None:
        """Start with all blocks free and no request.

        Args:
            geometry: sizes; ``blocks`` has ``R + W`` entries.
            blocks: vLLM's blocks by id.
            make_list: vLLM's free queue class.
            tables: blocks of each request, in order; changed in place.
            entries: of blocks in the prefix cache.
            parking: policy of eviction of parked KV; None parks nothing.
        """
        self.geometry = geometry
        self.boundary = geometry.resident_blocks
        self.window = geometry.pooled_blocks
        self._blocks = blocks
        self.tables = tables
        self.entries = entries
        self.rows = RowLedger(geometry.rows, self.boundary, geometry.chunk_rows)
        self.parking = Parking(self.rows, geometry.rows, parking)
        self.queue = TieredFreeBlockQueue(blocks, self.boundary, make_list, self)
        self.victims = Victims(tables, self.boundary)
        self._requests = self.victims.holders
        self._full = self.victims.full
        self.reading = ReadSet(self.rows, geometry.chunk_rows)
        self.demoted = False
        self._relabels = RelabelLog()
        self._step = 0
        self.chunks_usable = self.chunks_expected = geometry.num_chunks
        self.demotions = 0
        self.promotions = 0
        self.catch_up: Callable[[], None] = lambda: None
        self.on_leave: Callable[[str], None] = lambda _: None

    # What vLLM's block manager tells.

    def admit(self, request_id: str, hits: int = 0) -> None:
        """A request is about to get its first blocks; ``hits`` are cached ones."""
        self.victims.admit(request_id, hits)

    def admitted(self, request_id: str) -> None:
        """A request got its first blocks: note the pooled ones among its hits."""
        for block in self.tables[request_id][: self._requests[request_id].full]:
            if block.block_id >= self.boundary:
                self.reading.add(request_id, block.block_id)

    def computed(self, request_id: str, num_full: int) -> None:
        """The first ``num_full`` blocks of a request are complete after this step."""
        holder = self._requests[request_id]
        if num_full > holder.full:
            for block in self.tables[request_id][holder.full : num_full]:
                self.set_full(block)
            holder.full = num_full
            self.victims.offer(holder)
            self.queue.refresh()

    def computed_again(self, request_id: str, num_full: int) -> None:
        """As ``computed``, for a request admitted in this step: also its hits."""
        for block in self.tables[request_id][:num_full]:
            self.set_full(block)
        request = self._requests[request_id]
        request.full = num_full
        request.cursor = 0  # Restored hits are complete only now.
        self.victims.offer(request)
        self.queue.refresh()

    def forget(self, request_id: str) -> None:
        """A request is about to give its blocks back."""
        self.on_leave(request_id)
        if self.victims.forget(request_id):
            self.reading.forget(request_id)

    def set_full(self, block: Any) -> None:
        """The KV of a block in use is complete."""
        block_id = block.block_id
        if block_id < self.boundary and not self._full[block_id]:
            self._full[block_id] = 1
            self.queue.demotable += 1

    def clear_full(self, block_id: int) -> None:
        """The KV of a resident page is not what a block in use holds."""
        if self._full[block_id]:
            self._full[block_id] = 0
            self.queue.demotable -= 1

    # FreeObserver.

    def on_reused(self, block: Any) -> None:
        """An idle cached resident is in use again; idle cached KV is complete."""
        if block.block_id not in self.parking.copies.restores:
            self.set_full(block)

    def on_resident_freed(self, block: Any) -> None:
        """Nobody uses a resident any more; what is to be demoted there is not."""
        self.clear_full(block.block_id)

    def on_evicted(self, block: Any) -> None:
        """A free resident gets another use: what it caches may be parked."""
        self.parking.evicted(block)

    def on_pooled_dropped(self, block: Any) -> None:
        """A pooled id gets another use: its row is parked, or free."""
        if self.rows.holds(block.block_id):
            self.parking.left_row(block)
        self.entries.drop(block)

    def make_residents_free(self, count: int) -> None:
        """Demote up to ``count`` blocks, as far as pooled ids are free."""
        self.catch_up()
        make_free(self, count)

    # Relocation.

    def relabel(self, index: int, block: Any, target: Any, users: Collection[str]) -> None:
        """Put ``target`` in the place of a block in the tables of its users."""
        for request_id in users:
            self.tables[request_id][index] = target
            self._relabels.record(request_id, index, target.block_id)
        target.ref_cnt = block.ref_cnt
        block.ref_cnt = 0
        self.entries.move(block, target)

    def discard(self, block: Any) -> None:
        """The KV of a block is wrong: nobody may find it any more."""
        self.entries.drop(block)
        idle = block.ref_cnt == 0 and block.block_id >= self.boundary
        if idle and not self.queue.is_blank(block.block_id):
            self.queue.remove(block)
            self.queue.prepend_n([block])

    # A step.

    def begin_step(self, waiting: Collection[str] = (), most: int | None = None) -> None:
        """Before vLLM's ``schedule``: say who is left out because of the link.

        Their tails and blocks not full hold residents that do nothing. Where
        those are more than ``MOST_HELD`` of all, nothing more is demoted: vLLM
        then preempts the last request instead, as it does without a pool. So
        it is while ``most`` pooled blocks or more are in use.
        """
        beyond = most is not None and self.pooled_in_use >= most
        if not waiting and not self.queue.frozen and not beyond:
            return
        held = sum(len(self.tables[r]) - len(self.reading.pooled(r)) for r in waiting)
        frozen = beyond or held > MOST_HELD * self.boundary
        if frozen != self.queue.frozen:
            self.queue.frozen = frozen
            self.queue.refresh()

    def forget_idle(self) -> None:
        """Drop all KV in the pool that no request uses: its memory may be gone."""
        self.queue.forget_cached_pooled()
        self.forget_parked()

    def forget_parked(self) -> None:
        """Nobody may hit what is parked any more."""
        self.parking.clear()
        self.withhold()

    def use_chunks(self, chunks: int, expected: int | None = None) -> None:
        """Hand out rows of the first ``chunks`` chunks only, at least ``rows.chunks_held``.

        Args:
            chunks: whose rows are there.
            expected: chunks that will be there soon; None is no more than those.
        """
        self.chunks_usable = chunks
        self.chunks_expected = chunks if expected is None else max(chunks, expected)
        self.rows.usable = min(chunks * self.geometry.chunk_rows, self.geometry.rows)
        self.withhold()

    def withhold(self) -> None:
        """Keep back pooled ids for which there is no row."""
        coming = min(self.chunks_expected * self.geometry.chunk_rows, self.geometry.rows)
        withheld = max(0, self.window - self.rows.usable + self.parking.held)
        self.queue.missing = max(0, self.window - coming + self.parking.held)
        if withheld != self.queue.withheld:
            self.queue.withheld = withheld
            self.queue.refresh()

    def end_step(
        self,
        scheduled: Mapping[str, Any],
        fresh: Collection[str],
        forward: bool,
        headroom: int | None,
        budget: int | None = None,
        ahead: Ahead | None = None,
    ) -> StepPlan | None:
        """After vLLM's ``schedule``: the plan, or None when there is nothing to do.

        Args:
            scheduled: the requests that run in this step, by id.
            fresh: ids whose whole table is sent to the workers in this step
                (new and resumed requests); they need no relabels.
            forward: whether the model runs.
            headroom: free residents to leave alone by promotion; None
                promotes nothing.
            budget: blocks that the step may load; promotions of requests that
                do not run in it keep within. None is without end.
            ahead: what may be stored ahead of eviction; None is nothing.
        """
        self._step += 1  # Steps without a plan count: the engine must notice the gap.
        reading = self.reading
        copies: list[tuple[int, int]] = []
        if reading.by_request:
            reading.follow(scheduled, len(scheduled) == len(self._requests))
            room = 0 if headroom is None else self.queue.free_residents - headroom
            if room > 0 and forward and not self.demoted:
                copies = promote_free(self, fresh, room, budget)
        self.demoted = False
        if ahead and forward and self.parking.enabled:
            copies_now = reading.readers or copies or self.parking.pending
            if ahead.prompts or (copies_now and self._step % LOOK_STEPS == 0):
                write_through(self, ahead)
        stores: tuple[Copy, ...] = ()
        promotions: tuple[Copy, ...] = ()
        if self.parking.pending:
            stored, restored = self.parking.take()
            self.withhold()
            stores = merge(stored, self.geometry.chunk_rows)
            promotions = merge(copies + restored, self.geometry.chunk_rows)
        relabels = self._relabels.drain(self._requests, fresh) if self._relabels.ids else ()
        if not (stores or promotions or relabels or reading.readers):
            return None
        loads, pooled = reading.take(), self.pooled_in_use
        return StepPlan(self._step, stores, promotions, loads, relabels, forward, pooled)

    @property
    def blocks(self) -> Sequence[Any]:
        """All blocks, by id."""
        return self._blocks

    @property
    def pooled_in_use(self) -> int:
        """Pooled ids that requests use now."""
        return self.window - self.queue.free_pooled

    @property
    def residents_in_use(self) -> int:
        """Resident ids that requests use now."""
        return self.boundary - 1 - self.queue.free_residents

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all books agree; costs a pass over all blocks."""
        from pie_vllm.policy.placement.integrity import check_residency

        check_residency(self)

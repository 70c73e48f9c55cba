"""Where blocks live: which are demoted, which promoted, and what a step loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from pie_vllm.errors import IntegrityError
from pie_vllm.geometry import Geometry
from pie_vllm.plan import StepPlan
from pie_vllm.policy.block import Block, BlockId, RequestId, Row, Table
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.policy.placement.headroom import AHEAD_STEPS
from pie_vllm.policy.placement.integrity import check_books
from pie_vllm.policy.placement.interfaces import FreeList, GroupBeside, PrefixEntries
from pie_vllm.policy.placement.promotion_order import PromotionOrder
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.placement.row_supply import RowSupply
from pie_vllm.policy.placement.step_planner import StepPlanner
from pie_vllm.policy.placement.store_ahead import LOOK_STEPS, Ahead, store_ahead
from pie_vllm.policy.placement.victims import Stretch, Victims
from pie_vllm.policy.pool.extents import CHAIN
from pie_vllm.policy.pool.parked_kv import Parking
from pie_vllm.policy.pool.rows import RowLedger

_ID: Callable[[Block], BlockId] = attrgetter("block_id")

BLOCKED_SHARE_MAX = 0.2
"""Share of the residents that link-blocked requests may hold before demotion stops."""


class Residency:
    """Decides the tier of every block in use, and has its planner make the plan of each step.

    Where a model has several groups of layers, it is about the one that is pooled. The others take
    residents for as long as they want, without a word of what they do to their pages, so that the
    workers keep copies and such work apart (``StepPlan.stores_first``, ``after_all``).

    It owns no bytes. It changes block tables (lists of blocks, one per request) in place, and
    prefix-cache entries with them. A step is: ``begin_step``; vLLM's ``schedule``, during which
    allocations call back and demote; ``end_step``, which returns the plan.

    Attributes:
        geometry: Sizes of both tiers.
        blocks: All blocks, by id.
        tables: Block table of each request.
        boundary: Number of resident blocks; ids below it are resident.
        window: Number of pooled ids.
        queue: Free blocks of both tiers, in place of vLLM's free queue.
        entries: Prefix-cache entries of blocks.
        rows: Ledger of the CPU pool's rows.
        parking: KV that no request uses, in rows beyond those of pooled blocks.
        victims: Requests that hold blocks, and the order in which their blocks are demoted.
        read_set: Pooled blocks of each request, and those that the step loads.
        supply: Rows whose CPU memory is there, and pooled ids kept back for want of them.
        planner: Numbers the steps and builds the plan of each.
        beside: Groups of layers without a pool, which take residents, too.
        shared: Whether there are such groups.
        ahead_max: Number of blocks demoted where fewer are asked for, if so many are private.
        demotions: Number of blocks demoted since the start.
        promotions: Number of blocks promoted since the start.
        evictions: Number of cached residents that got another use since the start.
        catch_up: Hook called before a demotion; it tells of blocks that are complete by then.
        on_leave: Hook called with a request that is about to give its blocks back.
    """

    def __init__(
        self,
        geometry: Geometry,
        blocks: Sequence[Block],
        make_list: Callable[[list[Block]], FreeList],
        tables: Mapping[RequestId, Table],
        entries: PrefixEntries,
        parking: str | None = None,
        *,
        beside: Sequence[GroupBeside] = (),
        distinct: bool = False,
    ) -> None:
        """Start with all blocks free and no request.

        Args:
            geometry: Sizes; ``blocks`` has ``R + W`` entries.
            blocks: vLLM's blocks by id.
            make_list: vLLM's free queue class.
            tables: Blocks of each request, in order; changed in place.
            entries: Prefix-cache entries of blocks.
            parking: Eviction policy of parked KV; None parks nothing.
            beside: Groups of layers without a pool, which take residents, too.
            distinct: Whether blocks of one key may differ, as ``Parking`` has it.

        Raises:
            ConfigError: There is no such eviction policy.
        """
        self.geometry = geometry
        self.blocks = blocks
        self.tables = tables
        self.boundary = geometry.resident_blocks
        self.window = geometry.pooled_blocks
        self.entries = entries
        self.rows = RowLedger(geometry.rows, self.boundary, geometry.chunk_rows)
        self.parking = Parking(
            self.rows, geometry.rows, parking, preempted_only=bool(beside), distinct=distinct
        )
        self.queue = TieredFreeBlockQueue(blocks, self.boundary, make_list, self, entries.key_of)
        self.victims = Victims(tables, self.boundary)
        self.read_set = ReadSet(self.rows, self.boundary, self.window, geometry.chunk_rows)
        self.beside, self.shared = beside, bool(beside)
        self.supply = RowSupply(geometry, self.rows, self.queue, self.parking)
        self.planner = StepPlanner(
            geometry, self.queue, self.parking, self.read_set, self.supply, shared=self.shared
        )
        self._promotion_order = PromotionOrder(
            tables, self.boundary, self.window, self.read_set, self.victims
        )
        self.ahead_max = 1
        self.demotions = 0
        self.promotions = 0
        self.evictions = 0
        self.catch_up: Callable[[], None] = lambda: None
        self.on_leave: Callable[[RequestId], None] = lambda _: None
        self._promotes_from = 0  # The first step that promotes, after the newest demotion.

    # What requests do.

    def admit(self, request_id: RequestId, hits: int = 0) -> None:
        """A request is about to get its first blocks; ``hits`` of them are cached ones."""
        self.victims.admit(request_id, hits)

    def admitted(self, request_id: RequestId) -> None:
        """A request got its first blocks; the pooled ones among its hits are noted."""
        holder = self.victims.holders[request_id]
        hits = self.tables[request_id][: holder.full]
        pooled = [block_id for block_id in map(_ID, hits) if block_id >= self.boundary]
        self.read_set.add_all(request_id, pooled)
        if hits:
            place = self.parking.places.get(hits[-1].block_id)
            if place is not None and place % CHAIN == len(hits) - 1:
                self.victims.continue_chain(holder, place - place % CHAIN)

    def computed(self, request_id: RequestId, num_full: int) -> None:
        """The first ``num_full`` blocks of a request are complete after this step."""
        holder = self.victims.holders[request_id]
        if num_full > holder.full:
            blocks = self.tables[request_id][holder.full : num_full]
            self._set_full(blocks)
            self._note_places(holder.chain + holder.full, blocks)
            holder.full = num_full
            self.victims.offer(holder)
            self.queue.refresh()

    def computed_again(self, request_id: RequestId, num_full: int) -> None:
        """``computed`` for a request admitted in this step, which includes its hits."""
        self._set_full(self.tables[request_id][:num_full])
        holder = self.victims.holders[request_id]
        self._note_places(
            holder.chain + holder.full, self.tables[request_id][holder.full : num_full]
        )
        holder.full = num_full
        holder.cursor = 0  # Restored hits are complete only now.
        self.victims.offer(holder)
        self.queue.refresh()

    def forget(self, request_id: RequestId) -> None:
        """A request is about to give its blocks back."""
        self.on_leave(request_id)
        holder = self.victims.forget(request_id)
        if holder is not None:
            left = self.tables.get(request_id, [])[holder.full :]
            self._note_places(holder.chain + holder.full, left)
            self.read_set.forget(request_id)

    def _note_places(self, first: int, blocks: Sequence[Block]) -> None:
        """These blocks are at places from ``first`` on of a chain."""
        places = range(first, first + len(blocks))
        self.parking.places.update(zip(map(_ID, blocks), places, strict=True))

    def _set_full(self, blocks: Iterable[Block]) -> None:
        """The KV of these blocks in use, which differ, is complete."""
        full, ids = self.victims.full, self._residents_among(blocks)
        known = sum(map(full.__getitem__, ids))
        if known < len(ids):
            for block_id in ids:
                full[block_id] = 1
            self.queue.demotable += len(ids) - known

    def _residents_among(self, blocks: Iterable[Block]) -> list[BlockId]:
        """Ids of those of the blocks that are resident; there may be thousands."""
        ids: list[BlockId] = [*map(_ID, blocks)]
        if ids and max(ids) >= self.boundary:
            return [block_id for block_id in ids if block_id < self.boundary]
        return ids

    # What the free queue does, as its observer.

    def on_reused(self, blocks: Sequence[Block]) -> None:
        """Idle cached residents are in use again; their KV is complete unless on its way."""
        pooled = self.entries.pooled
        if pooled is not None:
            blocks = [block for block in blocks if pooled(block)]
        restores = self.parking.copies.restores
        self._set_full([b for b in blocks if b.block_id not in restores] if restores else blocks)

    def on_residents_freed(self, blocks: Sequence[Block]) -> None:
        """Nobody uses these residents any more, so they are no candidates for demotion."""
        full, ids = self.victims.full, self._residents_among(blocks)
        known = sum(map(full.__getitem__, ids))
        if known:
            for block_id in ids:
                full[block_id] = 0
            self.queue.demotable -= known

    def on_evicted(self, blocks: Sequence[Block]) -> None:
        """Free residents get another use: what they cache may be parked."""
        self.evictions += len(blocks)
        watched, keys = self.parking.watched, [*map(self.entries.key_of, blocks)]
        watched.any_changed(keys)
        self.parking.evicted(keys, [*map(_ID, blocks)])

    def on_pooled_dropped(self, block: Block) -> None:
        """A pooled id gets another use: its row is parked, or free."""
        self.parking.watched.changed(block.block_hash)
        if self.rows.holds(block.block_id):
            self.parking.left_row(block)
        self.entries.drop(block)

    # Demotion.

    def make_residents_free(self, count: int) -> None:
        """Demote up to ``count`` blocks, as far as pooled ids are free."""
        self.catch_up()
        victims = self.victims
        count = min(count, self.queue.available_pooled)
        most = min(max(count, self.ahead_max), self.queue.available_pooled)
        while most > 0 and (stretch := victims.private(most)) is not None:
            self._demote(stretch, (stretch.request_id,))
            most -= len(stretch.blocks)
            count -= len(stretch.blocks)
        if count < 0:  # Residents that are free ahead of their use are not for promotion.
            self._promotes_from = self.planner.step + 1 + AHEAD_STEPS
        if count <= 0:
            return
        for stretch in victims.rest():
            self._demote(stretch, victims.users(stretch.index, stretch.blocks[0]))
            count -= 1
            if count <= 0:
                return

    def _demote(self, stretch: Stretch, users: Collection[RequestId]) -> None:
        """Give resident blocks, each of all these requests, pooled ids, and their KV rows."""
        request_id, first, blocks = stretch
        parking, queue, full = self.parking, self.queue, self.victims.full
        place = self.victims.holders[request_id].chain + first
        for block in blocks:
            if block.ref_cnt != len(users):
                raise IntegrityError(
                    f"block {block.block_id} has {block.ref_cnt} users, {len(users)} were found"
                )
            full[block.block_id] = 0
        targets = queue.take_pooled_n(place, len(blocks))
        ids = [target.block_id for target in targets]
        parking.demoted(blocks, ids, place)
        queue.demotable -= len(blocks)
        self._relabel(first, blocks, targets, users)
        for name in users:
            self.read_set.add_all(name, ids)
        queue.prepend_n(blocks)
        self._promotes_from = max(self._promotes_from, self.planner.step + 2)
        self.demotions += len(blocks)

    # Promotion.

    def _promote(
        self, first: int, blocks: Sequence[Block], users: Sequence[RequestId]
    ) -> list[tuple[BlockId, Row]]:
        """Give pooled blocks, each of all these requests, free residents; the pages and rows."""
        targets = self.queue.popleft_n(len(blocks))
        self.entries.drop_cached(targets)
        pages = [target.block_id for target in targets]
        ids = [block.block_id for block in blocks]
        rows = [*map(self.rows.row_of, ids)]
        self.parking.promoted(blocks, pages)
        self._note_places(self.victims.holders[users[0]].chain + first, targets)
        self._relabel(first, blocks, targets, users)
        for request_id in users:
            self.read_set.discard_all(request_id, ids)
            self.victims.offer_from(request_id, first)
        self._set_full(targets)
        self.queue.give_blank(blocks)
        self.promotions += len(blocks)
        return [*zip(pages, rows, strict=True)]

    def _relabel(
        self,
        first: int,
        blocks: Sequence[Block],
        targets: Sequence[Block],
        users: Collection[RequestId],
    ) -> None:
        """Put ``targets`` in the place of neighbouring blocks in the tables of their users."""
        ids = [target.block_id for target in targets]
        for request_id in users:
            self.tables[request_id][first : first + len(ids)] = targets
            self.planner.relabels.record(request_id, first, ids)
        move, watched = self.entries.move, self.parking.watched
        for block, target in zip(blocks, targets, strict=True):
            target.ref_cnt, block.ref_cnt = block.ref_cnt, 0
            if watched.places:
                watched.changed(block.block_hash)
            move(block, target)

    # KV that may not be found any more.

    def forget_idle(self) -> None:
        """Drop all KV in the pool that no request uses: its memory may be gone."""
        self.parking.watched.all_changed()
        self.queue.forget_cached_pooled()
        self.forget_parked()

    def forget_parked(self) -> None:
        """Drop all parked KV, so that nobody hits it any more."""
        self.parking.clear()
        self.supply.withhold()

    def discard(self, block: Block) -> None:
        """The KV of a block is wrong: nobody may find it any more."""
        self.parking.watched.changed(block.block_hash)
        self.entries.drop(block)
        idle = block.ref_cnt == 0 and block.block_id >= self.boundary
        if idle and not self.queue.is_blank(block.block_id):
            self.queue.remove(block)
            self.queue.prepend_n([block])

    # A step.

    def begin_step(
        self, blocked: Collection[RequestId] = (), pooled_max: int | None = None
    ) -> None:
        """Before vLLM's ``schedule``: decide whether the step may demote.

        Tails and incomplete blocks of link-blocked requests hold residents that do nothing. Where
        those are more than ``BLOCKED_SHARE_MAX`` of all, nothing more is demoted: vLLM then
        preempts the last request instead, just as it does without a pool. Nothing is demoted
        either while ``pooled_max`` pooled blocks or more are in use.

        Args:
            blocked: Requests that are left out of the step because of the link.
            pooled_max: Number of pooled blocks in use from which on nothing is demoted; None for
                no bound.
        """
        beyond = pooled_max is not None and self.pooled_in_use >= pooled_max
        if pooled_max is not None:
            self.ahead_max = min(self.ahead_max, max(1, pooled_max - self.pooled_in_use))
        if not blocked and not self.queue.frozen and not beyond:
            return
        held = sum(len(self.tables[r]) - len(self.read_set.pooled(r)) for r in blocked)
        frozen = beyond or held > BLOCKED_SHARE_MAX * self.boundary
        if frozen != self.queue.frozen:
            self.queue.frozen = frozen
            self.queue.refresh()

    def end_step(
        self,
        scheduled: Mapping[RequestId, Any],
        fresh: Collection[RequestId],
        forward: bool,
        headroom: int | None,
        load_blocks_max: int | None = None,
        ahead: Ahead | None = None,
    ) -> StepPlan | None:
        """After vLLM's ``schedule``: the plan, or None when there is nothing to do.

        Args:
            scheduled: Requests that run in this step, by id.
            fresh: Requests whose whole table is sent to the workers in this step (new and resumed
                ones); they need no relabels.
            forward: Whether the model runs.
            headroom: Number of free residents that promotion leaves alone; None promotes nothing.
            load_blocks_max: Maximum number of blocks that the step loads, which bounds promotions
                of requests that do not run in it; None for no bound.
            ahead: What may be stored ahead of eviction; None for nothing.
        """
        read_set, parking, step = self.read_set, self.parking, self.planner.next_step()
        promoted: list[tuple[BlockId, Row]] = []
        if read_set.by_request:
            read_set.follow(scheduled, len(scheduled) == len(self.victims.holders))
            room = 0 if headroom is None else self.queue.free_residents - headroom
            if room > 0 and forward and step >= self._promotes_from:
                for stretch in self._promotion_order.stretches(fresh, room, load_blocks_max):
                    promoted += self._promote(*stretch)
        if ahead and forward and parking.enabled:
            copies_now = read_set.num_blocks or promoted or parking.pending
            if ahead.prompts or (copies_now and step % LOOK_STEPS == 0):
                store_ahead(self.queue, parking, ahead)
        return self.planner.plan(promoted, self.victims.holders, fresh, forward)

    # Counts.

    @property
    def pooled_in_use(self) -> int:
        """Number of pooled ids that requests use now."""
        return self.window - self.queue.free_pooled

    @property
    def residents_in_use(self) -> int:
        """Number of resident ids that requests use now."""
        return self.boundary - 1 - self.queue.free_residents

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all books agree; costs a pass over all blocks."""
        check_books(self)

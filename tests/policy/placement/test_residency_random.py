"""Residency: whatever happens, every table names the right content and all books agree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS
from pie_vllm.policy.admission.restore import ParkedKey, cancel, restore
from pie_vllm.policy.placement import free_queue
from pie_vllm.policy.pool import extents
from tests.helpers.fakes import FakePool


class Tiers(RuleBasedStateMachine):
    """Requests come, fill blocks, hit, grow, stop for a step, are preempted and end.

    Content is followed by plans alone: what a page or row holds changes only by
    a write, a store or a load, and every table must name what its request wrote.
    """

    @initialize(
        resident=st.integers(4, 9),
        pooled=st.integers(1, 9),
        extra=st.integers(0, 9),
        parking=st.sampled_from([None, "lru"]),
        extents_min=st.sampled_from([2, 4, 64]),
        ahead_max=st.integers(1, 4),
    )
    def start(
        self,
        resident: int,
        pooled: int,
        extra: int,
        parking: str | None,
        extents_min: int,
        ahead_max: int,
    ) -> None:
        self.geometry = Geometry(2, 4096, resident, pooled, 1, pooled + extra, 3, 4096)
        with pytest.MonkeyPatch.context() as patch:
            # Extents of 1 to 8 rows and gaps of 0 to 8 ids in a small pool.
            patch.setattr(extents, "EXTENTS_MIN", extents_min)
            patch.setattr(free_queue, "GAP_SHARE", extents_min)
            self.pool = FakePool(self.geometry, parking)
        self.residency = self.pool.residency
        self.residency.ahead_max = ahead_max
        self.pages: dict[int, Any] = {}
        self.rows: dict[int, Any] = {}
        self.loads = NO_RUNS
        self.written: dict[str, list[Any]] = {}
        self.history: list[list[Any]] = []
        self.full: dict[str, int] = {}
        self.worker: dict[str, list[int]] = {}
        self.fresh: set[str] = set()
        self.serial = 0

    def _write(self, request_id: str) -> None:
        """Put content into the blocks that the request just got."""
        written = self.written[request_id]
        for block in self.pool.tables[request_id][len(written) :]:
            self.serial += 1
            written.append(self.serial)
            block.pending = self.serial

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        """A request comes, perhaps with prefix hits, and takes new blocks."""
        request_id = f"q{self.serial}-{len(self.written)}"
        self.serial += 1
        hits: list[Any] = []
        parking = self.residency.parking
        chains = [w for w in self.history[-12:] if w]
        if chains and data.draw(st.booleans()):
            for content in data.draw(st.sampled_from(chains)):
                if content in self.pool.cached:
                    hits.append(self.pool.cached[content])
                elif parking.has(content):
                    hits.append(ParkedKey(content))
                else:
                    break
        hits, residents = self._restored(data, hits)
        self.pool.tables[request_id] = []
        self.residency.admit(request_id, len(hits))
        queue = self.residency.queue
        queue.admission(sum(b.ref_cnt == 0 for b in hits) - residents)
        parking.copies.allowance = data.draw(st.sampled_from([None, None, 0, 1]))
        new = data.draw(st.integers(1, 3))
        need = new + sum(b.ref_cnt == 0 for b in hits)
        fits = need <= queue.num_free_blocks
        if fits:
            contents = [b.block_hash for b in hits]
            self.pool.hit(request_id, hits)
            self.written[request_id] = contents
            self.history.append(contents)
            self.full[request_id] = len(contents)
            fits = self.pool.allocate(request_id, new)
            assert fits, "the admission promised blocks that could not be had"
        queue.admission()
        if not fits:
            self.residency.forget(request_id)
            del self.pool.tables[request_id]
            cancel(self.residency, hits)
            return
        self.residency.admitted(request_id)
        self._write(request_id)
        self.fresh.add(request_id)

    def _restored(self, data: st.DataObject, found: list[Any]) -> tuple[list[Any], int]:
        """The hits, parked ones restored as far as there is room, and how many are residents."""
        queue, boundary = self.residency.queue, self.residency.boundary
        idle = [b for b in found if not isinstance(b, ParkedKey) and b.ref_cnt == 0]
        queue.freshen(idle)
        pooled = sum(b.block_id >= boundary for b in idle)
        parked = sum(isinstance(b, ParkedKey) for b in found)
        most = min(parked, max(0, queue.free_residents - len(idle) + pooled))
        residents = data.draw(st.integers(0, most))
        room = residents + max(0, queue.free_pooled - pooled)
        while parked > room:
            parked -= isinstance(found.pop(), ParkedKey)
        residents = min(residents, parked)
        return restore(self.residency, found, 0, residents), residents

    @precondition(lambda self: set(self.written) - self.fresh)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        """A running request takes a new block; it fails only when nothing can be had."""
        request_id = data.draw(st.sampled_from(sorted(set(self.written) - self.fresh)))
        queue = self.residency.queue
        reachable = queue.free_residents + min(queue.available_pooled, queue.demotable)
        assert self.pool.allocate(request_id, 1) == (reachable >= 1)
        self._write(request_id)

    @precondition(lambda self: bool(self.written))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """A request ends, is aborted or preempted, in the middle of a step or between."""
        request_id = data.draw(st.sampled_from(sorted(self.written)))
        self.pool.free(request_id)
        for book in (self.written, self.full, self.worker):
            book.pop(request_id, None)
        self.fresh.discard(request_id)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """The step ends: carry out its plan and check what the scheduled requests read."""
        scheduled = {r: 1 for r in self.written if r in self.fresh or data.draw(st.booleans())}
        pages = self.geometry.resident_blocks
        for request_id in scheduled:
            count = len(self.written[request_id])
            for index, block in enumerate(self.pool.tables[request_id]):
                new = index >= self.full[request_id] and block.block_hash is None
                if new and data.draw(st.booleans()):
                    block.block_hash = self.written[request_id][index]
                    self.pool.cached[block.block_hash] = block
            self.full[request_id] = count
            self.residency.computed(request_id, count)
            if request_id in self.fresh:
                self.residency.computed_again(request_id, count)
        headroom = data.draw(st.sampled_from([None, 0, 2]))
        plan = self.residency.end_step(scheduled, self.fresh, bool(scheduled), headroom)
        for page in [p for p in self.pages if p >= pages]:
            del self.pages[page]
        if plan is not None:
            if plan.loads is not None:
                self.loads = plan.loads
            for block, row, count in plan.stores.tolist():
                for i in range(count):
                    self.rows[row + i] = self.pages[block + i]
            for block, row, count in (*plan.promotions.tolist(), *self.loads.tolist()):
                assert row // 3 == (row + count - 1) // 3, "a run crosses a chunk"
                for i in range(count):
                    self.pages[block + i] = self.rows[row + i]
            for request_id, first, blocks in plan.relabels:
                self.worker[request_id][first : first + len(blocks)] = blocks
        for request_id in self.written:
            ids = [b.block_id for b in self.pool.tables[request_id]]
            known = self.worker.setdefault(request_id, [])
            known[:] = ids if request_id in self.fresh else known + ids[len(known) :]
            assert known == ids, "a worker's table misses a relabel"
        for request_id in scheduled:
            for index, block in enumerate(self.pool.tables[request_id]):
                content = self.written[request_id][index]
                if getattr(block, "pending", None) == content:
                    self.pages[block.block_id] = content
                    block.pending = None
                assert self.pages[block.block_id] == content, "foreign content"
        self.fresh -= scheduled.keys()

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        """CPU memory gets scarce or plenty; what nobody uses is perhaps forgotten."""
        if data.draw(st.booleans()) and not self.residency.parking.copies.restores:
            self.residency.forget_idle()
        held = self.residency.rows.chunks_held
        self.residency.supply.use_chunks(
            data.draw(st.integers(max(held, 1), self.geometry.num_chunks))
        )
        self.rows = {row: c for row, c in self.rows.items() if row // 3 < max(held, 1)}

    @invariant()
    def books_agree(self) -> None:
        """All books agree with the tables."""
        self.residency.check_integrity()


def test_tiers_keep_content_and_books() -> None:
    """Random operations in any order."""
    budget = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Tiers, settings=budget)

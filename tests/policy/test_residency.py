"""Residency: whatever happens, every table names the right content and all books agree."""

from __future__ import annotations

import random
from typing import Any

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

from pie_vllm.policy.geometry import Geometry
from tests.helpers.fakes import FakePool


def sizes(resident: int, pooled: int, extra_rows: int = 0) -> Geometry:
    return Geometry(2, 4096, resident, pooled, 1, pooled + extra_rows, 3, 4096)


def running(*names: str) -> dict[str, int]:
    """Requests that run in a step, one token each."""
    return dict.fromkeys(names, 1)


def admit(pool: FakePool, name: str, count: int, full: int | None = None) -> None:
    """A request comes and gets blocks, of which the first are full after its first step."""
    pool.tables[name] = []
    pool.residency.admit(name)
    assert pool.allocate(name, count)
    pool.residency.admitted(name)
    pool.residency.computed_again(name, count if full is None else full)


def start(pool: FakePool, name: str, count: int, full: int | None = None) -> None:
    """As ``admit``, and the first step."""
    admit(pool, name, count, full)
    pool.residency.end_step(running(name), {name}, True, None)


class Tiers(RuleBasedStateMachine):
    """Requests come, fill blocks, hit, grow, stop for a step, are preempted and end.

    Content is followed by plans alone: what a page or row holds changes only by
    a write, a store or a load, and every table must name what its request wrote.
    """

    @initialize(resident=st.integers(4, 9), pooled=st.integers(1, 9), extra=st.integers(0, 3))
    def start(self, resident: int, pooled: int, extra: int) -> None:
        self.geometry = sizes(resident, pooled, extra)
        self.pool = FakePool(self.geometry)
        self.residency = self.pool.residency
        self.pages: dict[int, Any] = {}
        self.rows: dict[int, Any] = {}
        self.loads: tuple[Any, ...] = ()
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
        chains = [w for w in self.history[-12:] if w and w[0] in self.pool.cached]
        if chains and data.draw(st.booleans()):
            for content in data.draw(st.sampled_from(chains)):
                if content not in self.pool.cached:
                    break
                hits.append(self.pool.cached[content])
        self.pool.tables[request_id] = []
        self.residency.admit(request_id, len(hits))
        queue = self.residency.queue
        queue.admission(sum(b.ref_cnt == 0 for b in hits))
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
            return
        self.residency.admitted(request_id)
        self._write(request_id)
        self.fresh.add(request_id)

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
            for block, row, count in plan.stores:
                for i in range(count):
                    self.rows[row + i] = self.pages[block + i]
            for block, row, count in (*plan.promotions, *self.loads):
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
        if data.draw(st.booleans()):
            self.residency.queue.forget_cached_pooled()
        held = self.residency.rows.chunks_held
        self.residency.use_chunks(data.draw(st.integers(max(held, 1), self.geometry.num_chunks)))
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


def test_demotion_takes_the_request_admitted_last_first() -> None:
    """Few requests stream: all blocks of the last one before any of the one before."""
    pool = FakePool(sizes(8, 8))
    residency = pool.residency
    for name in ("first", "second"):
        admit(pool, name, 3, full=2)
    residency.end_step(running("first", "second"), {"first", "second"}, True, None)
    assert pool.allocate("first", 3)
    pooled = {name: sum(b.block_id >= 8 for b in table) for name, table in pool.tables.items()}
    assert pooled == {"first": 0, "second": 2}
    assert pool.tables["second"][2].block_id < 8
    plan = residency.end_step(running("first", "second"), (), True, None)
    assert plan is not None
    assert sum(copy.count for copy in plan.stores) == 2
    assert [r.request_id for r in plan.relabels] == ["second"]
    assert plan.loads is not None
    assert sum(copy.count for copy in plan.loads) == 2
    again = residency.end_step(running("first", "second"), (), True, None)
    assert again is not None
    assert again.loads is None, "unchanged loads are not sent again"
    alone = residency.end_step(running("first"), (), True, None)
    assert alone is None, "a step that reads no pooled block has no plan"


def test_free_residents_are_used_for_promotion() -> None:
    """When residents are free again, pooled blocks of running requests return for good."""
    pool = FakePool(sizes(8, 8))
    residency = pool.residency
    start(pool, "a", 4)
    start(pool, "b", 5)
    assert residency.demotions == 2
    pool.free("b")
    plan = residency.end_step(running("a"), (), True, 1)
    assert plan is not None
    assert sum(copy.count for copy in plan.promotions) == 2
    assert all(block.block_id < 8 for block in pool.tables["a"])
    assert residency.end_step(running("a"), (), True, 1) is None
    residency.check_integrity()


def test_promoted_blocks_are_the_first_to_be_demoted_again() -> None:
    """A promotion does not hide a request from the search for what to demote."""
    pool = FakePool(sizes(9, 8))
    residency = pool.residency
    for name, count in (("old", 2), ("filler", 3), ("new", 4)):
        start(pool, name, count)
    everyone = running("old", "filler", "new")
    assert pool.allocate("old", 3)
    residency.end_step(everyone, (), True, None)
    assert sum(block.block_id >= 9 for block in pool.tables["new"]) == 3
    pool.free("filler")
    residency.end_step(running("old", "new"), (), True, 0)
    assert residency.promotions == 2
    assert pool.allocate("old", 2)
    assert all(block.block_id < 9 for block in pool.tables["old"])
    assert sum(block.block_id >= 9 for block in pool.tables["new"]) == 3
    residency.check_integrity()


def test_a_shared_block_moves_with_all_its_users() -> None:
    """Both tables of a shared prefix are relabelled in the same step."""
    pool = FakePool(sizes(5, 8))
    residency = pool.residency
    rng = random.Random(0)
    start(pool, "one", 2, full=1)
    shared = pool.tables["one"][0]
    shared.block_hash = rng.random()
    pool.cached[shared.block_hash] = shared
    pool.tables["two"] = []
    residency.admit("two", 1)
    pool.hit("two", [shared])
    assert pool.allocate("two", 1)
    residency.admitted("two")
    residency.computed_again("two", 1)
    residency.end_step(running("one", "two"), {"two"}, True, None)
    assert pool.allocate("one", 2)
    assert pool.tables["one"][0] is pool.tables["two"][0]
    assert pool.tables["one"][0].block_id >= 5
    plan = residency.end_step(running("one", "two"), (), True, None)
    assert plan is not None
    assert {r.request_id for r in plan.relabels} == {"one", "two"}
    residency.check_integrity()

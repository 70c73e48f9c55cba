"""Residency: which block is demoted, which promoted, and what a plan says of it."""

from __future__ import annotations

import random

from pie_vllm.geometry import Geometry
from pie_vllm.plan import num_copied
from pie_vllm.policy.placement.headroom import AHEAD_STEPS
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
    assert num_copied(plan.stores) == 2
    assert [r.request_id for r in plan.relabels] == ["second"]
    assert plan.loads is not None
    assert num_copied(plan.loads) == 2
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
    assert num_copied(plan.promotions) == 2
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


def test_blocks_demoted_ahead_of_need_go_in_one_run_and_stay() -> None:
    """One relabel and one run for all, and no promotion while they are free for what comes."""
    pool = FakePool(sizes(12, 12))
    residency = pool.residency
    start(pool, "old", 3)
    start(pool, "new", 7)
    residency.ahead_max = 4
    assert pool.allocate("old", 2), "one is free"
    assert (residency.demotions, residency.queue.free_residents) == (4, 3)
    everyone = running("old", "new")
    plan = residency.end_step(everyone, (), True, 0)
    assert plan is not None
    (relabel,) = plan.relabels
    assert (relabel.request_id, relabel.index) == ("new", 0)
    assert relabel.blocks == tuple(range(relabel.blocks[0], relabel.blocks[0] + 4))
    assert plan.loads is not None
    assert sum(count for _, _, count in plan.loads) == 4
    assert not residency.promotions
    for _ in range(AHEAD_STEPS - 1):
        residency.end_step(everyone, (), True, 0)
    assert not residency.promotions
    residency.end_step(everyone, (), True, 0)
    assert residency.promotions == 3
    residency.check_integrity()

"""Stores ahead of eviction: which blocks, and in which steps."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.policy.admission.restore import ParkedKey
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.store_ahead import LOOK_STEPS, Ahead
from tests.helpers.parked_steps import come_back, copied, leave, make, take


def test_what_is_stored_ahead_of_its_eviction_costs_no_store_then() -> None:
    """The block that is evicted first, as far as it is allowed; it keeps its page meanwhile."""
    pool = make()
    leave(pool, "a", "x", "y", "z")
    parking, page = pool.residency.parking, pool.cached["z"].block_id
    pool.tables["b"] = []
    pool.residency.admit("b")
    assert pool.allocate("b", 4)
    pool.residency.admitted("b")
    plan = pool.residency.end_step({"b": 1}, {"b"}, True, None, ahead=Ahead(1, 0, 8, prompts=True))
    ((stored, row),) = copied(plan.stores)
    assert stored == page
    assert pool.cached["z"].block_id == page, "it is still a hit"
    assert (parking.parked_blocks, parking.ahead_blocks) == (1, 1)
    pool.residency.check_integrity()
    assert take(pool, "c", 1) is None, "its page is used with nothing to copy"
    assert pool.tables["c"][0].block_id == page
    pool.free("b")
    pool.free("c")
    plan = come_back(pool, "d", [pool.cached["x"], pool.cached["y"], ParkedKey("z")], 1)
    assert [r for _, r in copied(plan.promotions)] == [row]


@pytest.mark.parametrize(
    ("ahead", "stored"),
    [
        (Ahead(8, 0, 8, prompts=True), "zyx"),
        (Ahead(8, 1, 3, prompts=True), "zyx"),
        (Ahead(2, 0, 8, prompts=True), "zy"),
        (Ahead(8, 0, 5, prompts=True), "z"),
        (Ahead(8, 1, 1, prompts=True), "z"),
        (Ahead(8, 0, 8, prompts=False), ""),
        (None, ""),
    ],
)
def test_how_much_is_stored_ahead(ahead: Ahead | None, stored: str) -> None:
    """In the order of eviction, among the first free residents; not in steps without a plan."""
    pool = make()
    leave(pool, "a", "x", "y", "z")
    pages = {pool.cached[c].block_id: c for c in "xyz"}
    plan = pool.residency.end_step({}, set(), True, None, ahead=ahead)
    assert "".join(pages[block] for block, _ in sorted_by_row(plan)) == stored
    assert pool.residency.parking.ahead_blocks == len(stored)


def sorted_by_row(plan: Any) -> list[tuple[int, int]]:
    """The stores in the order in which rows were handed out."""
    return sorted(copied(plan.stores), key=lambda copy: copy[1]) if plan else []


def test_nothing_is_stored_ahead_beyond_the_allowance_or_without_parking() -> None:
    """The stores of evictions count first."""
    for policy, allowance, stored in (("lru", 2, 2), ("lru", 0, 0), (None, None, 0)):
        pool = make(policy=policy)
        leave(pool, "a", "x", "y", "z")
        pool.residency.parking.copies.allowance = allowance
        plan = pool.residency.end_step({}, set(), True, None, ahead=Ahead(8, 0, 8, prompts=True))
        assert len(sorted_by_row(plan)) == stored
        pool.residency.check_integrity()


def test_while_requests_take_turns_nothing_is_stored_ahead() -> None:
    """They need the link; and what a decision does not allow is not looked for."""
    decision = Decision(8, 8, 0, store_ahead_max=4)
    assert Ahead.of(decision, False, 3, 2, True) == Ahead(4, 3, 2, prompts=True)
    assert Ahead.of(decision, True, 3, 2, True) is None
    assert Ahead.of(decision._replace(store_ahead_max=0), False, 3, 2, True) is None


def test_steps_that_load_anyway_store_ahead_now_and_then() -> None:
    """Of the steps that only decode, one in so many, and only while pooled blocks are read."""
    for streams in (True, False):
        pool = make()
        pool.tables["r"] = []
        pool.residency.admit("r")
        assert pool.allocate("r", 3)
        pool.residency.admitted("r")
        pool.residency.computed_again("r", 3)
        if streams:
            pool.residency.make_residents_free(1)
        pool.residency.end_step({"r": 1}, {"r"}, True, None)
        leave(pool, "a", "x", "y")
        stored = []
        for _ in range(2 * LOOK_STEPS):
            ahead = Ahead(1, 1, 8, prompts=False)
            plan = pool.residency.end_step({"r": 1}, set(), True, None, ahead=ahead)
            stored.append(len(sorted_by_row(plan)))
            pool.residency.check_integrity()
        assert sum(stored) == (2 if streams else 0)
        assert max(stored) <= 1

"""Tails: the last block of a preempted request, kept under the request's name."""

from __future__ import annotations

from tests.helpers.parked_steps import copied, make, take


def test_a_tail_comes_back_to_the_page_it_is_given() -> None:
    """Kept by its request's name until it is taken; then its row is free after the step."""
    pool = make()
    residency, parking = pool.residency, pool.residency.parking
    take(pool, "a", 1)
    (block,) = pool.tables["a"]
    parking.keep_tail("a", block, 0, 5)
    assert parking.tail_of("a") is None, "its row is stored in this very step"
    pool.free("a")
    plan = residency.end_step({}, (), False, None)
    assert plan is not None
    ((stored, row),) = copied(plan.stores)
    assert stored == block.block_id
    tail = parking.tail_of("a")
    assert tail is not None
    assert (tail.row, tail.tokens) == (row, 5)
    taken = parking.take_tail("a")
    parking.put_back("a", taken)
    parking.check_integrity()
    taken = parking.take_tail("a")
    parking.restore_tail(taken, 3)
    plan = residency.end_step({"a": 1}, {"a"}, True, None)
    assert plan is not None
    assert copied(plan.promotions) == [(3, row)]
    assert residency.rows.num_parked == 0


def test_a_tail_that_is_dropped_in_its_step_is_not_stored() -> None:
    """Its row is free at once, and no copy goes there."""
    pool = make()
    residency = pool.residency
    take(pool, "a", 1)
    residency.parking.keep_tail("a", pool.tables["a"][0], 0, 5)
    residency.parking.drop_tail("a")
    assert residency.rows.num_parked == 0
    pool.free("a")
    assert residency.end_step({}, (), False, None) is None

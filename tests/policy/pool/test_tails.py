"""Tails: the last block of a preempted request, kept under the request's name."""

from __future__ import annotations

from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.tails import Tail, Tails
from tests.helpers.parked_steps import copied, make, take


def test_a_tail_comes_back_to_the_page_it_is_given() -> None:
    """Kept by its request's name until it is taken; then its row is free after the step."""
    pool = make()
    residency, parking = pool.residency, pool.residency.parking
    take(pool, "a", 1)
    (block,) = pool.tables["a"]
    parking.keep_tail("a", block, 0, 5)
    assert parking.tails.find("a") is None, "its row is stored in this very step"
    pool.free("a")
    plan = residency.end_step({}, (), False, None)
    assert plan is not None
    ((stored, row),) = copied(plan.stores)
    assert stored == block.block_id
    tail = parking.tails.find("a")
    assert tail is not None
    assert (tail.row, tail.tokens) == (row, 5)
    taken = parking.tails.take("a")
    parking.tails.put_back("a", taken)
    parking.check_integrity()
    taken = parking.tails.take("a")
    parking.tails.restore(taken, 3)
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
    residency.parking.tails.drop("a")
    assert residency.rows.num_parked == 0
    pool.free("a")
    assert residency.end_step({}, (), False, None) is None


def three_tails() -> tuple[RowLedger, StepCopies, Tails]:
    """Tails of "a", "b" and "c" in rows 0, 1 and 2, stored in an earlier step."""
    rows = RowLedger(4, 10)
    copies = StepCopies(rows)
    tails = Tails(copies)
    for name in "abc":
        row = rows.take_parked()
        assert row is not None
        tails.keep(name, Tail(row, 0, 5))
    return rows, copies, tails


def test_a_request_has_one_tail() -> None:
    """A newer one takes the place of the older, whose row is free."""
    rows, _, tails = three_tails()
    row = rows.take_parked()
    assert row == 3
    tails.keep("a", Tail(row, 1, 9))
    assert tails.find("a") == Tail(3, 1, 9)
    assert (len(tails), rows.num_parked) == (3, 3)
    assert sorted(tails.rows()) == [1, 2, 3]


def test_tails_are_dropped_by_age_request_and_row() -> None:
    """Their rows are free at once; unknown names and rows change nothing."""
    rows, _, tails = three_tails()
    tails.drop_oldest()
    assert tails.find("a") is None
    tails.drop_in(["a", "z"], {2})
    assert tails.rows() == [1]
    tails.drop_in(["b"], ())
    tails.drop_oldest()
    assert (len(tails), rows.num_parked) == (0, 0)


def test_a_tail_that_was_taken_is_not_cleared() -> None:
    """Its row belongs to the step that restores it."""
    rows, copies, tails = three_tails()
    tail = tails.take("b")
    tails.restore(tail, 7)
    tails.clear()
    assert (len(tails), rows.num_parked) == (0, 1)
    assert copies.take() == ([], [(7, 1)])
    assert rows.num_parked == 0

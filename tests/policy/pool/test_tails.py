"""Tails: the last block of a preempted request, kept under the request's name."""

from __future__ import annotations

from typing import Any

from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.row_room import RowRoom
from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.tails import Tail, TailBlock, Tails
from pie_vllm.policy.pool.watched_keys import WatchedKeys
from tests.helpers.fakes import FakePool
from tests.helpers.parked_steps import copied, make, take


def test_a_tail_comes_back_to_the_page_it_is_given() -> None:
    """Kept by its request's name until it is taken; then its row is free after the step."""
    pool = make()
    residency, parking = pool.residency, pool.residency.parking
    take(pool, "a", 1)
    (block,) = pool.tables["a"]
    parking.tails.keep_last("a", block, 0, 5)
    assert parking.tails.find("a") is None, "its row is stored in this very step"
    pool.free("a")
    plan = residency.end_step({}, (), False, None)
    assert plan is not None
    ((stored, row),) = copied(plan.stores)
    assert stored == block.block_id
    tail = parking.tails.find("a")
    assert tail is not None
    assert tail == Tail((TailBlock(row, 0),), 0, 5)
    taken = parking.tails.take("a")
    parking.tails.put_back("a", taken)
    parking.check_integrity()
    taken = parking.tails.take("a")
    parking.tails.restore(taken.blocks[0], 3)
    plan = residency.end_step({"a": 1}, {"a"}, True, None)
    assert plan is not None
    assert copied(plan.promotions) == [(3, row)]
    assert residency.rows.num_parked == 0


def test_a_tail_that_is_dropped_in_its_step_is_not_stored() -> None:
    """Its row is free at once, and no copy goes there."""
    pool = make()
    residency = pool.residency
    take(pool, "a", 1)
    residency.parking.tails.keep_last("a", pool.tables["a"][0], 0, 5)
    residency.parking.tails.drop("a")
    assert residency.rows.num_parked == 0
    pool.free("a")
    assert residency.end_step({}, (), False, None) is None


def one(row: int, index: int, tokens: int) -> Tail:
    """A tail of one block."""
    return Tail((TailBlock(row, index),), index, tokens)


def no_tails() -> tuple[RowLedger, StepCopies, Tails]:
    """Four rows, none of which is taken."""
    rows = RowLedger(4, 10)
    copies = StepCopies(rows)
    room = RowRoom(rows, ParkedIndex(4), copies, WatchedKeys())
    return rows, copies, Tails(rows, room, copies)


def three_tails() -> tuple[RowLedger, StepCopies, Tails]:
    """Tails of "a", "b" and "c" in rows 0, 1 and 2, stored in an earlier step."""
    rows, copies, tails = no_tails()
    for name in "abc":
        row = rows.take_parked()
        assert row is not None
        tails.keep(name, one(row, 0, 5))
    return rows, copies, tails


def test_a_request_has_one_tail() -> None:
    """A newer one takes the place of the older, whose row is free."""
    rows, _, tails = three_tails()
    row = rows.take_parked()
    assert row == 3
    tails.keep("a", one(row, 1, 9))
    assert tails.find("a") == one(3, 1, 9)
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
    tails.restore(tail.blocks[0], 7)
    tails.clear()
    assert (len(tails), rows.num_parked) == (0, 1)
    assert copies.take() == ([], [(7, 1)])
    assert rows.num_parked == 0


def whole(pool: FakePool, name: str, key: str, window: int, *, pooled: bool = False) -> Any:
    """A request with a full block and one that is begun, and a block of a window, is preempted."""
    take(pool, name, 2 + pooled)
    full, *tail = pool.tables[name]
    full.block_hash = key
    blocks = [(block, index, None) for index, block in enumerate(tail, 1)]
    kept = [*blocks, (pool.blocks[window], 4, 1)]
    return kept, pool.residency.parking.tails.keep_whole(name, kept, [key], 19, 3)


def test_a_whole_tail_has_all_blocks_and_the_keys_in_front() -> None:
    """Full blocks whose keys go with no tail are not worth a row."""
    pool = make(preempted_only=True)
    parking = pool.residency.parking
    kept, done = whole(pool, "a", "x", 7)
    assert done
    assert parking.wanted is not None
    assert "x" in parking.wanted
    assert (parking.copies.stores_beside, parking.copies.fills_beside) == (True, False)
    plan = pool.residency.end_step({}, (), False, None)
    assert plan is not None
    assert plan.stores_after_all
    stored = dict(copied(plan.stores))
    tail = parking.tails.find("a")
    assert tail is not None
    assert (tail.index, tail.tokens, tail.whole, tail.beside) == (1, 19, True, 1)
    assert [stored[block.block_id] for block, _, _ in kept] == [b.row for b in tail.blocks]
    parking.check_integrity()
    taken = parking.tails.take("a")
    assert "x" not in parking.wanted
    parking.tails.put_back("a", taken)
    assert "x" in parking.wanted
    taken = parking.tails.take("a")
    for number, block in enumerate(taken.blocks):
        parking.tails.restore(block, 3 + number)
    plan = pool.residency.end_step({"a": 1}, {"a"}, True, None)
    assert plan is not None
    assert plan.promotions_first
    assert dict(copied(plan.promotions)) == {3 + i: b.row for i, b in enumerate(taken.blocks)}
    assert pool.residency.rows.num_parked == 0


def test_of_a_whole_tail_that_has_no_room_nothing_is_kept() -> None:
    """Rows that were taken for it are free again, and nothing is stored."""
    pool = make(rows=2, preempted_only=True)
    _, done = whole(pool, "a", "x", 7, pooled=True)
    assert not done
    assert (len(pool.residency.parking.tails), pool.residency.rows.num_parked) == (0, 0)
    assert not pool.residency.parking.copies.stores


def test_keys_are_worth_parking_as_long_as_one_tail_wants_them() -> None:
    """Two requests may begin with the same full blocks."""
    rows, _, tails = no_tails()
    for name in "ab":
        row = rows.take_parked()
        assert row is not None
        tails.keep(name, Tail((TailBlock(row, 0, 1),), 1, 16, whole=True, keys=("x",)))
    tails.drop("a")
    assert "x" in tails.keys
    tails.drop("b")
    assert "x" not in tails.keys


def test_only_wanted_blocks_are_parked_when_they_are_evicted() -> None:
    """And what was to fill the others, which nobody takes any more, does not."""
    pool = make(preempted_only=True)
    parking = pool.residency.parking
    whole(pool, "a", "x", 7)
    parking.copies.restores[5] = 1
    parking.evicted(["y", "x"], [5, 6])
    assert not parking.parked("y")
    assert parking.parked("x")
    assert not parking.copies.restores

"""Parking: which KV is kept when its block gets another use, and what comes back when."""

from __future__ import annotations

import random

import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.admission.restore import ParkedKey, cancel, restore
from pie_vllm.policy.pool import extents
from tests.helpers.parked_steps import block, come_back, copied, leave, make, parking_of, take


def test_an_evicted_block_is_stored_before_its_page_is_used() -> None:
    """The step that takes the page copies it out first; the last block of a prefix goes first."""
    pool = make()
    leave(pool, "a", "x", "y", "z")
    pages = {pool.cached[c].block_id: c for c in "xyz"}
    plan = take(pool, "b", 5)
    stored = copied(plan.stores)
    assert [pages[block] for block, _ in stored] == ["z"]
    parking = pool.residency.parking
    assert parking.has("z")
    assert not parking.has("x"), "it has its page still"
    assert "z" not in pool.cached


def test_a_block_comes_back_to_a_resident_page_and_stays_parked() -> None:
    """Its row is read once; the next use of that page costs no store."""
    pool = make()
    leave(pool, "a", "x", "y")
    ((_, row_y), (_, row_x)) = sorted(copied(take(pool, "b", 7).stores), reverse=True)
    pool.free("b")
    plan = come_back(pool, "c", [ParkedKey("x"), ParkedKey("y")], residents=2)
    filled = dict(copied(plan.promotions))
    ids = [block.block_id for block in pool.tables["c"]]
    assert {filled[ids[0]], filled[ids[1]]} == {row_x, row_y}
    assert not len(plan.stores)
    assert len(pool.residency.parking) == 2
    pool.free("c")
    assert take(pool, "d", 7) is None, "copies of both are in the pool"


def test_a_block_comes_back_to_a_pooled_id_without_a_copy_of_its_own() -> None:
    """The id takes the parked row; the step loads it like any pooled block."""
    pool = make()
    leave(pool, "a", "x", "y")
    rows = {row for _, row in copied(take(pool, "b", 7).stores)}
    pool.free("b")
    plan = come_back(pool, "c", [ParkedKey("x"), ParkedKey("y")], residents=1)
    ids = [block.block_id for block in pool.tables["c"]]
    assert ids[0] < 8 <= ids[1]
    assert [block for block, _ in copied(plan.promotions)] == ids[:1]
    assert [block for block, _ in copied(plan.loads)] == ids[1:2]
    assert {row for _, row in (*copied(plan.promotions), *copied(plan.loads))} == rows
    pool.free("c")
    assert pool.cached["y"].block_id == ids[1], "idle, it is still a hit"


def test_demotion_uses_the_copy_that_is_parked() -> None:
    """A block that came back and is demoted again takes its old row; nothing is stored."""
    pool = make(resident=6, pooled=4)
    leave(pool, "a", "x", "y")
    take(pool, "b", 5)
    pool.free("b")
    come_back(pool, "c", [ParkedKey("x"), ParkedKey("y")], residents=2)
    plan = take(pool, "d", 4)
    assert pool.residency.demotions == 2
    assert not len(plan.stores)
    assert not len(pool.residency.parking)


def test_a_pooled_id_that_is_reused_leaves_its_row_parked() -> None:
    """Idle cached KV outlives its id, as far as there are rows."""
    pool = make(resident=6, pooled=1, rows=4)
    leave(pool, "a", "x")
    kept = pool.cached["x"]
    pool.tables["a2"] = []
    pool.residency.admit("a2", 1)
    pool.hit("a2", [kept])
    pool.residency.admitted("a2")
    pool.residency.computed_again("a2", 1)
    pool.residency.end_step({"a2": 1}, {"a2"}, True, None)
    take(pool, "b", 5)
    assert pool.cached["x"].block_id == 6
    pool.free("a2")
    pool.residency.computed("b", 5)
    pool.tables["c"] = []
    pool.residency.admit("c")
    assert pool.allocate("c", 1)
    pool.residency.end_step({"b": 1, "c": 1}, {"c"}, True, None)
    assert pool.residency.parking.has("x")
    assert "x" not in pool.cached
    pool.residency.check_integrity()


def test_pooled_blocks_have_the_first_call_on_rows() -> None:
    """Parked KV gives way, the least recently used first."""
    pool = make(resident=8, pooled=3, rows=3)
    leave(pool, "a", "x", "y")
    take(pool, "b", 7)
    pool.residency.computed("b", 7)
    parking = pool.residency.parking
    assert len(parking) == 2
    pool.tables["c"] = []
    pool.residency.admit("c")
    assert pool.allocate("c", 3)
    pool.residency.end_step({"b": 1, "c": 1}, {"c"}, True, None)
    pool.residency.check_integrity()
    assert pool.residency.pooled_in_use == 3
    assert not len(parking)


def test_the_allowance_of_a_step_limits_what_is_stored() -> None:
    """Beyond it blocks are lost, as without a pool, and counted."""
    pool = make()
    parking = pool.residency.parking
    leave(pool, "a", "x", "y", "z")
    parking.copies.allowance = 1
    assert len(copied(take(pool, "b", 7).stores)) == 1
    assert (parking.parked_blocks, parking.lost_blocks) == (1, 2)


def test_nothing_is_parked_where_it_is_off() -> None:
    """Without a policy of eviction there is no index, no store, no tail."""
    pool = make(policy=None)
    leave(pool, "a", "x", "y", "z")
    pool.residency.parking.tails.keep_last("p", pool.residency.blocks[1], 0, 5)
    assert take(pool, "b", 7) is None
    assert not pool.residency.parking.enabled
    assert not pool.residency.parking.tails


def test_hits_that_are_not_taken_hold_nothing_again() -> None:
    """A page that is not filled must not be a hit; its row is parked as before."""
    pool = make()
    leave(pool, "a", "x")
    take(pool, "b", 7)
    pool.free("b")
    hits = restore(pool.residency, [ParkedKey("x")], 0, 1)
    assert pool.cached["x"] is hits[0]
    cancel(pool.residency, hits)
    assert "x" not in pool.cached
    pool.residency.end_step({}, (), False, None)
    assert pool.residency.parking.has("x")
    pool.residency.check_integrity()


def test_what_is_pinned_is_not_given_up() -> None:
    """A row that a step copies from is not stored over in that step."""
    pool = make(resident=8, pooled=1, rows=2)
    leave(pool, "a", "x", "y")
    take(pool, "b", 7)
    pool.free("b")
    leave(pool, "c", "p", "q")
    plan = come_back(pool, "d", [ParkedKey("x"), ParkedKey("y")], residents=2, new=5)
    read = {row for _, row in copied(plan.promotions)}
    assert len(read) == 2
    assert not read & {row for _, row in copied(plan.stores)}
    assert pool.residency.parking.lost_blocks > 0


def test_parked_kv_is_not_forgotten_inside_a_step() -> None:
    """What a request counts on must come."""
    pool = make()
    leave(pool, "a", "x")
    take(pool, "b", 7)
    pool.free("b")
    restore(pool.residency, [ParkedKey("x")], 0, 1)
    with pytest.raises(IntegrityError, match="cannot be forgotten"):
        pool.residency.forget_parked()


def test_a_page_that_is_not_filled_yet_may_be_taken_again() -> None:
    """It is neither stored nor filled then, and its KV stays parked."""
    pool = make()
    leave(pool, "a", "x")
    take(pool, "b", 7)
    pool.free("b")
    restore(pool.residency, [ParkedKey("x")], 0, 1)
    assert take(pool, "c", 7) is None
    assert pool.residency.parking.has("x")


def test_what_a_step_stores_it_cannot_copy_back() -> None:
    """The row is not written before the copy would read it."""
    pool = make()
    leave(pool, "a", "x")
    pool.tables["b"] = []
    pool.residency.admit("b")
    assert pool.allocate("b", 7)
    assert len(pool.residency.parking) == 1
    assert not pool.residency.parking.has("x")
    pool.residency.end_step({"b": 1}, {"b"}, True, None)
    assert pool.residency.parking.has("x")


def test_blocks_that_came_back_are_found_for_demotion() -> None:
    """Not in the step that fills them; from the next one on, without a search of all tables."""
    pool = make()
    leave(pool, "a", "x")
    take(pool, "b", 7)
    pool.free("b")
    victims = pool.residency.victims
    come_back(pool, "c", [ParkedKey("x")], 1, meanwhile=lambda: victims.private(1) is None)
    victim = victims.private(1)
    assert victim is not None
    assert (victim.request_id, victim.index) == ("c", 0)


def test_rows_that_a_step_reads_are_no_rows_for_demotion() -> None:
    """Until the step is planned; then they may be given up."""
    pool = make(pooled=2, rows=2)
    leave(pool, "a", "x", "y")
    take(pool, "b", 7)
    pool.free("b")
    queue = pool.residency.queue
    assert queue.available_pooled == 2
    hits = restore(pool.residency, [ParkedKey("x"), ParkedKey("y")], 0, 2)
    assert queue.available_pooled == 0
    cancel(pool.residency, hits)
    pool.residency.end_step({}, (), False, None)
    assert queue.available_pooled == 2


@pytest.mark.parametrize("key", ["p", None])
def test_the_row_of_a_promoted_block_lasts_for_the_step(key: str | None) -> None:
    """The step copies from it; after that it is parked, or free where it has no key."""
    rows, parking = parking_of(1)
    rows.take(10)
    parking.promoted([block(10, key)], [3])
    assert (parking.held, rows.num_parked) == (1, 1)
    assert not parking.has("p")
    assert not parking.keep(block(3, "x")), "there is no other row"
    assert parking.pending
    parking.take()
    assert (parking.held, parking.has("p")) == (0, key is not None)
    assert parking.keep(block(3, "x"))
    assert not parking.parked("p")
    parking.check_integrity()


def test_a_tail_gives_way_to_a_pooled_block_when_nothing_else_is_parked() -> None:
    """The oldest one, and only after all full blocks."""
    rows, parking = parking_of(3)
    parking.tails.keep_last("a", block(1, None), 0, 5)
    parking.tails.keep_last("b", block(2, None), 0, 5)
    assert parking.keep(block(3, "x"))
    parking.take()
    assert parking.row_for(block(4, "y"), 10, 0) == (2, False)
    assert (len(parking), len(parking.tails)) == (0, 2)
    assert parking.row_for(block(5, "z"), 11, 1) == (0, False)
    assert parking.tails.find("a") is None
    assert parking.tails.find("b") is not None
    assert rows.num_parked == 1
    parking.check_integrity()


@pytest.mark.parametrize("seed", range(40))
def test_blocks_are_evicted_together_as_one_by_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows, stores, order of eviction and losses, whatever is parked and allowed."""
    monkeypatch.setattr(extents, "EXTENTS_MIN", 4)
    rng = random.Random(seed)
    rows = rng.choice((16, 40))
    (ledger, together), (_, singly) = parking_of(rows), parking_of(rows)
    kept = 0
    for _ in range(80):
        chain, first = rng.randrange(1, 6) * extents.CHAIN, rng.randrange(12)
        residents = [*range(rng.randrange(1, 9))]
        keys = [f"{chain}.{first + r}" for r in residents]
        if rng.random() < 0.3:  # Two pages hold the same KV.
            keys[rng.randrange(len(keys))] = rng.choice(keys)
        allowance = rng.choice((None, 0, 3, 20))
        places = {r: chain + first + r for r in residents if rng.random() < 0.9}
        # Some come back in this very step, to a page that gets another use at once, or to another.
        back = [key for key in keys if rng.random() < 0.1]
        pages = {k: r + rng.choice((0, 100, 100)) for k, r in zip(keys, residents, strict=True)}
        for parking in (together, singly):
            parking.copies.allowance = allowance
            parking.places = dict(places)
            found = [key for key in back if parking.has(key)]
            parking.restore(parking.pin(found), [pages[key] for key in found])
        before = together.parked_blocks
        together.evicted(keys[::-1], residents[::-1])
        kept += together.parked_blocks - before > 1
        for key, resident in zip(keys[::-1], residents[::-1], strict=True):
            singly.evicted([key], [resident])
        assert [*together._index._order._order] == [*singly._index._order._order]
        assert together._index._rows == singly._index._rows
        assert together.copies.restores == singly.copies.restores
        assert together.copies.restores.keys().isdisjoint(residents)
        assert together.copies.stores == singly.copies.stores
        assert (together.parked_blocks, together.lost_blocks, together.copies.allowance) == (
            singly.parked_blocks,
            singly.lost_blocks,
            singly.copies.allowance,
        )
        together.check_integrity()
        ledger.check_integrity()
        if rng.random() < 0.7:
            assert together.take() == singly.take()
    assert kept > 5


@pytest.mark.parametrize("seed", range(40))
def test_demoted_together_they_get_the_rows_that_each_gets_alone(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whether some are parked, extents hold several, or rows run short and KV is evicted."""
    rng = random.Random(seed)
    monkeypatch.setattr(extents, "EXTENTS_MIN", rng.choice([2, 256]))
    rows = rng.choice([8, 12, 40])
    together, alone = parking_of(rows)[1], parking_of(rows)[1]
    for number in range(rng.randrange(6)):
        parked = block(number, f"k{number}")
        assert together.keep(parked) == alone.keep(parked)
    first, place = 100, rng.randrange(20)
    for _ in range(4):
        count = rng.randrange(1, 6)
        if first + count > 100 + rows:
            break
        known = rng.random() < 0.3
        keys = [f"k{i}" if known and rng.random() < 0.5 else f"n{first + i}" for i in range(count)]
        blocks = [block(50 + i, key) for i, key in enumerate(keys)]
        together.demoted(blocks, [*range(first, first + count)], place)
        for i, one in enumerate(blocks):
            row, stored = alone.row_for(one, first + i, place + i)
            if not stored:
                alone.copies.stores[row] = one.block_id
            alone.places[first + i] = place + i
        assert together.places == alone.places
        assert together._rows._row_of == alone._rows._row_of
        assert together.take() == alone.take()
        first, place = first + count, place + rng.choice([count, 20])
    together.check_integrity()
    together._rows.check_integrity()

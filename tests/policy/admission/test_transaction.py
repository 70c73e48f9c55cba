"""Admissions: prepared, committed, rolled back, and refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.policy.admission.candidate import Candidate, Claims
from pie_vllm.policy.admission.lookup import ParkedHits
from pie_vllm.policy.admission.transaction import Admission
from pie_vllm.policy.control.decider import Decision
from tests.helpers.fakes import FakePool
from tests.helpers.parked_steps import copied, leave, make, take

SIZE = 16
ALL = Decision(load_blocks_max=2, pooled_admission_max=2, spare_load_blocks_max=0)


def admission_of(pool: FakePool, decision: Decision = ALL, **other: Any) -> Admission:
    """In a step with these bounds."""
    admission = Admission(pool.residency, pool.find, SIZE, **other)
    admission.begin_step(decision, 0)
    return admission


def candidate(tokens: int, parked: ParkedHits | None = None, **other: Any) -> Candidate:
    """A request without cached hits that would compute all the rest of its tokens at once."""
    parked = parked or ParkedHits.none(0)
    new = tokens - parked.tokens
    asks = Candidate("c", tokens, 0, [], parked, new, tokens, whole=True, beside=True)
    return asks._replace(**other)


def with_parked() -> FakePool:
    """Seven residents that nobody uses; the KV of x, y and z is in rows only."""
    pool = make()
    leave(pool, "a", "x", "y", "z")
    take(pool, "b", 7)
    pool.free("b")
    assert not pool.cached
    return pool


def books(pool: FakePool) -> tuple[Any, ...]:
    """What a roll-back must leave as it was."""
    residency = pool.residency
    queue, parking = residency.queue, residency.parking
    return (
        queue.num_free_blocks,
        queue.free_residents,
        queue.available_pooled,
        queue.withheld,
        len(parking),
        parking.tails.rows(),
        dict(parking.copies.restores),
        dict(pool.cached),
        sorted(residency.victims.holders),
    )


def find(admission: Admission, tokens: int) -> ParkedHits:
    """The parked KV of a request whose first blocks are x, y and z."""
    found = admission.find_parked("c", tokens, ["x", "y", "z"], [])
    assert found is not None
    return found


def test_a_commit_restores_what_was_parked() -> None:
    """Three blocks are filled from their rows, in the request's order."""
    pool = with_parked()
    admission = admission_of(pool)
    parked = find(admission, 60)
    assert (parked.parked, parked.residents, parked.tokens) == (3, 3, 48)
    transaction = admission.prepare(candidate(60, parked))
    assert transaction is not None
    pool.tables["c"] = []
    with transaction:
        pool.hit("c", transaction.hits)
        assert pool.allocate("c", 1)
    transaction.commit()
    pool.residency.computed_again("c", 3)
    plan = pool.residency.end_step({"c": 12}, {"c"}, True, None)
    assert plan is not None
    pages = [block.block_id for block in pool.tables["c"][:3]]
    assert [page for page, _ in copied(plan.promotions)] == pages
    pool.residency.check_integrity()


@pytest.mark.parametrize("with_tail", [False, True])
def test_a_roll_back_leaves_all_as_it_was(with_tail: bool) -> None:
    """Pages, rows, keys and the tail; then the request can be prepared again."""
    pool = with_parked()
    if with_tail:
        pool.tables["c"] = []
        pool.residency.admit("c")
        assert pool.allocate("c", 4)
        pool.residency.parking.tails.keep_last("c", pool.tables["c"][3], 3, 55)
        pool.residency.end_step({}, (), False, None)
        pool.free("c")
    admission = admission_of(pool)
    before = books(pool)
    parked = find(admission, 60)
    assert bool(parked.tail_tokens) == with_tail
    for _ in range(2):
        transaction = admission.prepare(candidate(60, parked))
        assert transaction is not None
        assert transaction.has_tail == with_tail
        assert books(pool) != before
        with transaction:
            pass
        transaction.roll_back()
        assert books(pool) == before
        pool.residency.check_integrity()
    assert admission.refused == "residents"


def test_terms_hold_within_the_transaction_only() -> None:
    """Residents that others were promised are not there for the request, but for the others."""
    pool = make()
    take(pool, "b", 2)
    admission = admission_of(pool)
    admission.room.claims = lambda: Claims(prompts=True, tails=4)
    queue = pool.residency.queue
    before = queue.num_free_blocks
    transaction = admission.prepare(candidate(16))
    assert transaction is not None
    with transaction:
        assert queue.num_free_blocks == before - 4 - admission.room.prompt_reserve
    assert queue.num_free_blocks == before
    transaction.roll_back()


@pytest.mark.parametrize(
    ("tokens", "decision", "watermark", "refused"),
    [
        (9 * SIZE, ALL, 0.0, None),
        (9 * SIZE + 1, ALL, 0.0, "window"),
        (8 * SIZE, ALL._replace(pooled_admission_max=0), 0.0, "link"),
        (9 * SIZE, ALL, 0.2, "watermark"),
    ],
)
def test_a_request_that_fits_not_is_refused_by_name(
    tokens: int, decision: Decision, watermark: float, refused: str | None
) -> None:
    """Seven residents and two pooled blocks are free."""
    admission = admission_of(make(), decision, watermark=watermark)
    assert (admission.prepare(candidate(tokens)) is None) == (refused is not None)
    assert admission.refused == refused
    if refused in ("link", "watermark"):
        alone = admission_of(make(), decision, watermark=watermark)
        assert alone.prepare(candidate(tokens, beside=False)) is not None


def test_blocks_of_groups_without_a_pool_are_residents() -> None:
    """Pooled ids are of no use to them: seven residents hold five and one of two more blocks."""
    pool = make()
    admission = admission_of(pool)
    fits = candidate(20, others=5, others_now=5)
    assert admission.prepare(fits) is not None
    pool = make()
    admission = admission_of(pool)
    assert admission.prepare(candidate(20, others=8, others_now=2)) is None
    assert admission.refused == "residents"


def test_what_the_link_cannot_bring_at_once_comes_before_the_request() -> None:
    """One block a step while others run, and for as many steps as it has blocks."""
    pool = with_parked()
    admission = admission_of(pool, ALL._replace(restore_blocks_max=1))
    ahead: list[tuple[str, int]] = []
    admission.on_restored_ahead = lambda *told: ahead.append(told)
    assert admission.prepare(candidate(60, find(admission, 60))) is None
    assert admission.refused == "restore"
    assert ahead == [("c", 1)]
    assert list(pool.cached) == ["x"]
    pool.residency.end_step({}, (), False, None)
    admission.begin_step(ALL, 0)
    hits = [pool.cached["x"]]
    parked = admission.find_parked("c", 60, ["y", "z"], hits)
    assert parked is not None
    assert parked.tokens == 48
    assert admission.prepare(candidate(60, parked, hits=hits)) is not None


@pytest.mark.parametrize("new", [16, 40])
def test_a_prompt_under_way_claims_a_resident_of_those_behind_it(new: int) -> None:
    """One whose next chunk needs a page, not one that is computed at once."""
    pool = with_parked()
    admission = admission_of(pool)
    transaction = admission.prepare(candidate(40, request_id="first", new_tokens=new))
    assert transaction is not None
    pool.tables["first"] = []
    with transaction:
        assert pool.allocate("first", -(-new // SIZE))
    transaction.commit()
    free = pool.residency.queue.free_residents
    kept = admission.room.prompt_reserve if new < 40 else 0
    assert admission.room.available().residents == free - kept


def waits(admission: Admission, tokens: int = 60, **other: Any) -> ParkedHits | None:
    """One step in which the request that begins with x, y and z asks; what it found if it waits."""
    hits: Any = admission.recall("c", 0)
    known = [] if hits is None else hits
    parked = admission.find_parked("c", tokens, iter("xyz"[len(known) :]), known, state=0)
    asks = candidate(tokens, parked or ParkedHits.none(len(known) * SIZE), hits=known, **other)
    return parked if admission.prepare(asks) is None else None


def test_nothing_is_restored_for_a_request_that_finds_no_blocks() -> None:
    """Residents that others were promised do not suffice for what it computes: it costs nothing."""
    pool = with_parked()
    admission = admission_of(pool)
    admission.room.prompt_reserve = pool.residency.queue.free_residents
    before = books(pool)
    assert waits(admission, new_tokens=8) is not None
    assert admission.refused == "residents"
    assert books(pool) == before
    admission.room.prompt_reserve = 1
    assert waits(admission, new_tokens=8) is None
    assert books(pool) != before


def test_a_step_handles_a_bounded_number_of_blocks_while_others_run() -> None:
    """Also when the request has waited long enough: it computes the rest then."""
    pool = with_parked()
    admission = admission_of(pool)
    bounded = ALL._replace(handled_blocks_max=1)
    for step in range(4):
        admission.begin_step(bounded, 1)
        restored = len(pool.residency.parking.copies.restores)
        assert waits(admission) is not None, step
        assert len(pool.residency.parking.copies.restores) - restored <= 1
        pool.residency.end_step({}, (), False, None)
        if step < 3:
            pool.residency.discard(pool.cached["x"])
    admission.begin_step(bounded, 1)
    assert not admission._patience.waits("c", 4)
    parked = admission.find_parked("c", 60, iter("yz"), [pool.cached["x"]])
    assert parked is not None
    assert (parked.parked, parked.tokens) == (1, 2 * SIZE)


def test_the_bound_is_one_for_all_requests_of_a_step() -> None:
    """Who comes behind one whose KV came back waits for the next step, and loses no patience."""
    pool = with_parked()
    admission = admission_of(pool)
    admission.begin_step(ALL._replace(handled_blocks_max=2), 1)
    first = admission.find_parked("first", 36, iter("xy"), [])
    assert first is not None
    asks = candidate(36, first, request_id="first")
    transaction = admission.prepare(asks)
    assert transaction is not None
    pool.tables["first"] = []
    with transaction:
        pool.hit("first", transaction.hits)
        assert pool.allocate("first", 1)
    transaction.commit()
    assert len(pool.residency.parking.copies.restores) == 2
    parked = admission.find_parked("second", 20, iter("z"), [])
    assert parked is not None
    behind = candidate(20, parked, request_id="second")
    assert admission.prepare(behind) is None
    assert (admission.refused, admission._patience._steps) == ("restore", {})
    assert len(pool.residency.parking.copies.restores) == 2
    pool.residency.computed_again("first", 2)
    pool.residency.end_step({"first": 4}, {"first"}, True, None)
    admission.begin_step(ALL._replace(handled_blocks_max=2), 1)
    parked = admission.find_parked("second", 20, iter("z"), [])
    assert parked is not None
    assert admission.prepare(behind._replace(parked=parked)) is not None


def test_so_is_the_number_of_keys_that_a_step_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key is always looked at: most requests have nothing parked."""
    monkeypatch.setattr("pie_vllm.policy.admission.transaction.LOOK_KEYS_MAX", 2)
    admission = admission_of(with_parked())
    for keys, found in ((2, 2), (1, 1)):
        admission.begin_step(ALL, 1)
        admission._lookup.looked = 2 - keys
        hits = admission.find_parked("c", 60, iter("xyz"), [])
        assert hits is not None
        assert (hits.parked, hits.more) == (found, True)
        admission._lookup.forget()


def test_a_look_is_bounded_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request waits until all of its keys are looked at; it computes nothing parked."""
    monkeypatch.setattr("pie_vllm.policy.admission.transaction.LOOK_KEYS_MAX", 2)
    admission = admission_of(with_parked())
    admission.begin_step(ALL._replace(restore_blocks_max=0), 1)
    found = waits(admission)
    assert found is not None
    assert (found.parked, found.more, admission.refused) == (2, True, "restore")
    admission.begin_step(ALL, 1)
    assert waits(admission) is None
    alone = admission_of(with_parked())
    assert waits(alone) is None

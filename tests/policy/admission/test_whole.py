"""Preempted requests of models with several groups: all of one comes back, or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.geometry import Geometry, cdiv
from pie_vllm.policy.admission.candidate import Candidate
from pie_vllm.policy.admission.lookup import ParkedHits
from pie_vllm.policy.admission.restore import keep_whole, push_out
from pie_vllm.policy.admission.transaction import Admission
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.interfaces import GroupBeside
from tests.helpers.fakes import FakePool
from tests.helpers.parked_steps import copied, take

SIZE = 16
WINDOW = 20
COMPUTED = 56
"""Three full blocks and half of one."""

KEYS = "xyz"
ALL = Decision(load_blocks_max=4, pooled_admission_max=4, spare_load_blocks_max=0)


class Model:
    """A pool over a group of full attention and one of windows, and a request "c" over both.

    Attributes:
        pool: blocks and the table of the pooled group.
        windows: tables of the other group.
        window: tokens that it reaches back to, the next one included; a state is like two, and is
            in the block of its last token.
    """

    def __init__(self, resident: int = 12, rows: int = 12, window: int = WINDOW) -> None:
        self.windows: dict[str, list[Any]] = {}
        self.window = window
        beside = GroupBeside(1, self.windows, self.needed)
        sizes = Geometry(2, 4096, resident, 4, 1, rows, rows, 4096)
        self.pool = FakePool(sizes, "lru", [beside])
        self.admission = Admission(self.pool.residency, self.pool.find, SIZE)
        self.admission.begin_step(ALL, 0)

    def needed(self, tokens: int) -> range:
        """The blocks that the window reaches back to."""
        return range(max(0, tokens - self.window + 1) // SIZE, cdiv(tokens, SIZE))

    def give_window(self, name: str, blocks: int) -> None:
        """A request gets the last of so many blocks of its window."""
        null = self.pool.blocks[0]
        new = self.pool.residency.queue.popleft_n(len(self.needed(blocks * SIZE)))
        for block in new:
            self.pool.drop(block)
            block.ref_cnt = 1
        self.windows[name] = [null] * (blocks - len(new)) + new

    def run(self, computed: int = COMPUTED) -> None:
        """The request computes its tokens; its full blocks have keys."""
        take(self.pool, "c", cdiv(computed, SIZE))
        self.give_window("c", cdiv(computed, SIZE))
        for block, key in zip(self.pool.tables["c"], KEYS, strict=False):
            block.block_hash = key
            self.pool.cached[key] = block

    def preempt(self, computed: int = COMPUTED) -> None:
        """It gives all back after so many tokens; the step goes on."""
        self.admission.releases("c", computed, finished=False)
        self.pool.free("c")
        for block in self.windows.pop("c"):
            if not block.is_null:
                block.ref_cnt = 0
                self.pool.residency.queue.prepend_n([block])
        self.pool.residency.end_step({}, (), False, None)

    def find(self, hits: int = 0, tokens: int = COMPUTED + 1) -> ParkedHits | None:
        """What it finds, with so many of its blocks cached."""
        cached = [self.pool.cached[key] for key in KEYS[:hits]]
        return self.admission.find_parked("c", tokens, KEYS[hits:], cached)


@pytest.fixture
def model() -> Model:
    """The request is preempted, and others have used its residents since."""
    made = Model()
    made.run()
    made.preempt()
    take(made.pool, "b", 11)
    made.pool.free("b")
    assert not made.pool.cached
    return made


def asks(parked: ParkedHits, computed: int = COMPUTED, **other: Any) -> Candidate:
    """It is to compute one token behind so many."""
    all_of_it = computed + 1
    new = all_of_it - parked.tokens
    made = Candidate("c", all_of_it, 0, [], parked, new, all_of_it, whole=True, beside=True)
    return made._replace(others=2, others_now=2, **other)


def test_all_of_it_comes_back(model: Model) -> None:
    """Full blocks, the last one, and the window; the step says so."""
    parked = model.find()
    assert parked is not None
    assert (parked.tokens, parked.full_tokens, parked.tail, parked.cut) == (56, 48, True, False)
    transaction = model.admission.prepare(asks(parked))
    assert transaction is not None
    pool = model.pool
    pool.tables["c"] = []
    with transaction:
        pool.hit("c", transaction.hits)
        assert pool.allocate("c", 1)
        model.give_window("c", 4)
    transaction.commit()
    pool.residency.computed_again("c", 3)
    plan = pool.residency.end_step({"c": 1}, {"c"}, True, None)
    assert plan is not None
    assert (plan.promotions_first, plan.after_all) == (True, True)
    filled = [page for page, _ in copied(plan.promotions)]
    window = [block.block_id for block in model.windows["c"] if not block.is_null]
    last = pool.tables["c"][3].block_id
    assert len(window) == 2
    assert {*window, last} <= {*filled}
    assert not pool.residency.parking.tails
    pool.residency.check_integrity()


STATE = 2
"""Tokens that a state is like a window of."""


@pytest.mark.parametrize("computed", [47, 48, 49])
def test_a_state_comes_back_into_the_block_of_its_last_token(computed: int) -> None:
    """With keys, within a block and at its end; where the step moves it to is not filled."""
    model = Model(window=STATE)
    model.run(computed)
    model.preempt(computed)
    (kept,) = (b for b in model.pool.residency.parking.tails._tails["c"].blocks if b.group == 1)
    assert kept.index == (computed - 1) // SIZE
    take(model.pool, "b", 11)
    model.pool.free("b")
    parked = model.find(tokens=computed + 1)
    assert parked is not None
    assert (parked.tokens, parked.tail) == (computed, True)
    pool, null = model.pool, model.pool.blocks[0]
    transaction = model.admission.prepare(asks(parked, computed=computed))
    assert transaction is not None
    pool.tables["c"] = []
    with transaction:
        pool.hit("c", transaction.hits)
        assert pool.allocate("c", cdiv(computed + 1, SIZE) - len(transaction.hits))
        new = pool.residency.queue.popleft_n(cdiv(computed + 1, SIZE) - kept.index)
        for block in new:
            pool.drop(block)
            block.ref_cnt = 1
        model.windows["c"] = [null] * kept.index + new
    transaction.commit()
    assert pool.residency.parking.copies.restores[new[0].block_id] == kept.row
    assert not {block.block_id for block in new[1:]} & {*pool.residency.parking.copies.restores}


@pytest.mark.parametrize("computed", [32, 40, 47])
def test_a_state_that_no_step_has_left_is_not_cached(computed: int) -> None:
    """vLLM caches it in the step that leaves it, in which its request may be preempted."""
    model = Model(window=STATE)
    model.run()
    left, coming = model.pool.residency.queue.popleft_n(2)
    null = model.pool.blocks[0]
    model.windows["c"] = [null, left, coming]
    for block, key in ((left, "state-1"), (coming, "state-2")):
        model.pool.drop(block)
        block.ref_cnt, block.block_hash = 1, key
        model.pool.cached[key] = block
    model.admission.releases("c", computed, finished=False)
    assert left.block_hash == "state-1"
    assert coming.block_hash is None
    assert "state-2" not in model.pool.cached


def test_a_short_request_waits_for_the_room_of_its_state() -> None:
    """It has no full blocks; what its groups take is counted all the same."""
    model = Model(window=STATE)
    take(model.pool, "c", 1)
    model.give_window("c", 1)
    model.preempt(9)
    parked = model.find(tokens=10)
    assert parked is not None
    assert (parked.parked, parked.tail, parked.tokens) == (0, True, 9)
    free = model.pool.residency.queue.num_free_blocks
    request = asks(parked, computed=9)._replace(others=1)
    assert model.admission.prepare(request._replace(others_now=free)) is None
    assert model.admission.refused == "residents"
    assert model.admission.prepare(request._replace(others_now=free - 1)) is not None


def test_a_block_that_vllm_did_not_allocate_is_an_error(model: Model) -> None:
    """Its KV would have no place."""
    parked = model.find()
    assert parked is not None
    transaction = model.admission.prepare(asks(parked))
    assert transaction is not None
    model.pool.tables["c"] = []
    with transaction:
        model.pool.hit("c", transaction.hits)
        assert model.pool.allocate("c", 1)
    model.windows["c"] = [model.pool.blocks[0]] * 4
    with pytest.raises(IntegrityError, match="c has no block 2 in group 1"):
        transaction.commit()


def test_a_part_is_of_no_use(model: Model) -> None:
    """Where a full block is gone, nothing is found; other tokens than those do not do either."""
    assert model.find(tokens=COMPUTED) is None
    model.pool.residency.parking.forget(["y"])
    assert model.find() is None


def test_without_room_for_all_it_waits(model: Model) -> None:
    """Nothing of it counts as computed, and what it kept stays."""
    take(model.pool, "b", 8)
    model.admission.begin_step(ALL._replace(pooled_admission_max=0), 1)
    parked = model.find()
    assert parked is not None
    assert (parked.incomplete, parked.cut, parked.tokens, parked.tail) == (True, True, 0, False)
    assert model.admission.prepare(asks(parked)) is None
    assert model.admission.refused == "restore"
    assert model.pool.residency.parking.tails.find("c") is not None


def test_room_is_kept_for_the_windows() -> None:
    """Full blocks take pooled ids where the residents go to windows and to what is computed."""
    model = Model(resident=10)
    model.run()
    model.preempt()
    take(model.pool, "b", 9)
    model.pool.free("b")
    take(model.pool, "b", 4)
    model.admission.room.chunk_blocks = 1
    parked = model.find()
    assert parked is not None
    # Of five free residents two are of the window, two of the block that is computed.
    assert (parked.parked, parked.residents, parked.tail) == (3, 1, True)


@pytest.mark.parametrize("lacking", ["rows", "block", "restores"])
def test_what_cannot_be_kept_as_a_whole_is_not_kept(lacking: str) -> None:
    """Too few rows; a block that is not there; copies back that are not worth it."""
    model = Model(rows=4 if lacking == "rows" else 12)
    model.run()
    if lacking == "rows":
        take(model.pool, "b", 1)
        for _ in range(2):
            assert model.pool.residency.rows.take_parked() is not None
    elif lacking == "block":
        model.windows["c"][2] = model.pool.blocks[0]
    else:
        model.admission.begin_step(ALL._replace(restore_enabled=False), 0)
    model.admission.releases("c", COMPUTED, finished=False)
    parking = model.pool.residency.parking
    assert (len(parking.tails), len(parking.copies.stores)) == (0, 0)


def test_a_block_without_a_key_that_is_pooled_keeps_its_row() -> None:
    """With steps in flight a block may be full, and pooled, before its tokens are known."""
    model = Model()
    model.run()
    pool, table = model.pool, model.pool.tables["c"]
    pool.residency.computed_again("c", 3)
    pool.drop(table[2])
    pool.residency.make_residents_free(3)
    row = pool.residency.rows.row_of(table[2].block_id)
    assert keep_whole(pool.residency, "c", table, COMPUTED, SIZE)
    tail = pool.residency.parking.tails._tails["c"]
    assert (tail.index, tail.keys) == (2, ("x", "y"))
    assert tail.blocks[0].row == row


def test_residents_that_nobody_uses_make_room_for_windows() -> None:
    """They are parked, and found in rows a step later."""
    model = Model()
    model.run()
    model.preempt()
    hits = [model.pool.cached[key] for key in KEYS]
    free = model.pool.residency.queue.free_residents
    assert push_out(model.pool.residency, hits) == 3
    assert model.pool.residency.queue.free_residents == free
    assert not model.pool.cached
    plan = model.pool.residency.end_step({}, (), False, None)
    assert plan is not None
    assert {page for page, _ in copied(plan.stores)} == {block.block_id for block in hits}
    parked = model.find()
    assert parked is not None
    assert (parked.parked, parked.tail) == (3, True)
    model.pool.residency.check_integrity()


def test_who_comes_back_alone_makes_room_or_is_computed_anew() -> None:
    """First its idle residents are pushed out; then, with nothing left to do, it forgets all."""
    model = Model(resident=8)
    model.run()
    model.preempt()
    parked = model.find(hits=3)
    assert parked is not None
    hits = [model.pool.cached[key] for key in KEYS]
    alone = asks(parked, hits=hits, beside=False)._replace(others=2, others_now=8)
    assert model.admission.prepare(alone) is None
    assert model.admission.refused == "restore"
    model.pool.residency.end_step({}, (), False, None)
    assert not model.pool.cached
    again = model.find()
    assert again is not None
    alone = asks(again, beside=False)._replace(others=2, others_now=9)
    assert model.admission.prepare(alone) is None
    assert model.pool.residency.parking.tails.find("c") is None

"""ElasticPool: ahead of what is used, back when idle, and only rows that are there are used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.geometry import Geometry
from pie_vllm.plan import PoolOrder, PoolState
from pie_vllm.policy.control.elastic_pool import (
    FREE_MARGIN,
    LOOK_STEPS,
    PATIENCE_SECONDS,
    ElasticPool,
)

GEOMETRY = Geometry(4, 4096, 20, 160, 2, 160, 8, 4096)
CHUNKS = 20
CHUNK_BYTES = 8 * GEOMETRY.row_bytes


class World:
    """A clock and free memory that a test sets."""

    def __init__(self, least_blocks: int = 1, **options: int) -> None:
        self.now = 100.0
        self.free = FREE_MARGIN + CHUNKS * CHUNK_BYTES
        self.pool = ElasticPool(
            GEOMETRY,
            least_blocks,
            lambda: self.free,
            lambda: self.now,
            idle_seconds=60.0,
            **options,
        )

    def step(self, held: int, *, seconds: float = 0.1, idle: bool = False) -> PoolOrder:
        """A step after some time, at whose end so many chunks are held; the workers do as told."""
        self.now += seconds
        self.pool.begin_step(held)
        order = self.pool.end_step(held, changed=True, idle=idle)
        self.pool.report(PoolState(order.chunks, number=order.number))
        return order


def test_one_chunk_while_nothing_is_pooled() -> None:
    """Orders do not change either, so the workers have nothing to do."""
    world = World()
    first = world.step(0)
    assert first == PoolOrder(1)
    assert world.step(0, idle=True) is first
    assert all(world.step(0) is first for _ in range(5))


def test_the_first_chunks_are_there_from_the_start_and_stay() -> None:
    """They are usable before any report, and neither idle time nor a release takes them."""
    world = World(first_chunks=3)
    pool = world.pool
    assert (pool.order, pool.usable, pool.state) == (PoolOrder(3), 3, PoolState(3))
    assert world.step(0) == PoolOrder(3)
    assert world.step(0, idle=True) == PoolOrder(3), "there is nothing to give back"
    assert world.step(10).chunks == 12
    assert world.step(0, seconds=100.0).chunks == 3
    assert world.step(10).chunks == 12
    assert world.step(3, idle=True) == PoolOrder(12, idle=True, number=1)
    pool.begin_step(3)
    assert (pool.usable, pool.asking) == (3, False), "rows of the first chunks only"
    pool.report(PoolState(3, number=pool.order.number, released=1))
    pool.begin_step(3)
    assert pool.order.chunks == 3
    assert pool.usable == 3


def test_a_pool_that_is_held_whole_never_changes() -> None:
    """All chunks are first ones, whatever memory there is and however long nothing is needed."""
    world = World(first_chunks=CHUNKS)
    world.free = 0
    orders = [world.step(held, seconds=70.0) for held in (0, CHUNKS, 2, 0, 0)]
    assert orders == [PoolOrder(CHUNKS)] * 5
    assert not world.pool.scarce


def test_steps_that_change_nothing_look_now_and_then() -> None:
    """What they would see was seen; a worker's refusal is looked at in the next one."""
    world = World()
    first = world.step(4)
    world.now += 1000.0
    assert world.pool.end_step(4, changed=False) is first
    world.free = FREE_MARGIN
    world.pool.report(PoolState(4, refused=1))
    assert world.pool.end_step(4, changed=False) == PoolOrder(4, number=1)
    world.pool.report(PoolState(4, refused=1, number=1))
    world.free, world.now = FREE_MARGIN + CHUNKS * CHUNK_BYTES, world.now + 1000.0
    orders = [world.pool.end_step(4, changed=False) for _ in range(LOOK_STEPS)]
    assert {order.chunks for order in orders} == {4, 5}


@pytest.mark.parametrize(("held", "chunks"), [(1, 2), (7, 8), (8, 10), (16, 19), (20, 20)])
def test_it_is_ahead_by_a_chunk_and_an_eighth(held: int, chunks: int) -> None:
    """So that a step rarely waits for its chunk, and not beyond the ceiling."""
    assert World().step(held) == PoolOrder(chunks)


def test_it_shrinks_to_the_peak_of_the_idle_time() -> None:
    """Not at once, and not below what was needed meanwhile."""
    world = World()
    assert world.step(16).chunks == 19
    assert world.step(2, seconds=1).chunks == 19
    assert world.step(6, seconds=30).chunks == 19
    assert world.step(2, seconds=29).chunks == 7
    assert world.step(2, seconds=61).chunks == 3


def test_it_is_ahead_by_what_two_steps_can_take() -> None:
    """Also before anything is pooled, once the residents are nearly used up."""
    world = World(step_blocks=12)
    assert world.step(0).chunks == 1
    assert world.pool.end_step(0, changed=False, short=True).chunks == 1 + 3
    assert world.step(8).chunks == 10 + 3


def test_rows_are_used_only_once_they_were_reported() -> None:
    """Under the newest order number: an older report may be of what is on its way out."""
    pool = World().pool
    assert pool.usable == 1
    assert pool.end_step(5, changed=True) == PoolOrder(6)
    assert (pool.usable, pool.growing) == (1, True)
    pool.report(PoolState(4))
    assert (pool.usable, pool.growing) == (4, True)
    pool.report(PoolState(6))
    assert (pool.usable, pool.growing) == (6, False)
    less = World()
    assert less.step(5).chunks == 6
    assert less.step(1, seconds=61) == PoolOrder(2, number=1)
    assert less.pool.usable == 2
    assert less.step(5) == PoolOrder(6, number=1)
    less.step(1, seconds=61)
    less.pool.usable = 2
    less.pool.report(PoolState(6, number=1))
    assert less.pool.usable == 2, "a late report of an older order"


def test_what_was_left_to_the_workers_is_asked_for_before_it_is_used() -> None:
    """Until the answer nothing is scheduled; what they gave back must be forgotten."""
    for released in (False, True):
        world = World()
        pool = world.pool
        assert world.step(10) == PoolOrder(12)
        assert world.step(10, idle=True) == PoolOrder(12, idle=True)
        pool.report(PoolState(12))
        assert not pool.begin_step(10)
        assert pool.asking
        assert pool.usable == 1
        assert pool.paused(short=False)
        asked = pool.end_step(10, changed=True)
        assert asked == PoolOrder(12, number=1)
        pool.report(PoolState(1 if released else 12, released=released))
        assert pool.asking, "the report of an older order"
        pool.report(PoolState(12, number=1, released=released))  # It may have grown again.
        assert not pool.asking
        assert pool.usable == 12
        assert pool.begin_step(10) == released
        assert not pool.paused(short=False)
        assert pool.order == (PoolOrder(1, number=2) if released else asked), "it grows anew"
        assert pool.usable == (1 if released else 12)
        assert not pool.begin_step(10), "once"


def test_a_release_that_took_nothing_is_no_reason_to_forget() -> None:
    """The first chunk never goes, and without more there is nothing to ask for."""
    world = World()
    world.step(1)
    world.step(1, idle=True)
    assert not world.pool.begin_step(1)
    assert not world.pool.asking
    assert world.pool.usable == 1
    world.pool.end_step(1, changed=True)
    world.pool.report(PoolState(2, number=1, released=1))
    assert not world.pool.begin_step(1)
    assert world.pool.order == PoolOrder(1, number=2)


def test_an_engine_without_requests_gives_its_leave_anew() -> None:
    """Whatever else it does: an empty step that has not been answered is no reason to keep all."""
    world = World()
    world.step(10)
    for number in range(3):
        world.pool.begin_step(10)
        order = world.pool.end_step(10, changed=False, idle=True)
        assert order == PoolOrder(12, idle=True, number=number)


def test_a_step_without_a_report_leaves_nothing_to_count_on() -> None:
    """It is not waited for for ever."""
    world = World()
    world.step(10)
    world.step(10, idle=True)
    world.pool.begin_step(10)
    order = world.pool.end_step(10, changed=False)
    world.pool.unanswered(order)
    assert world.pool.begin_step(10)
    assert not world.pool.asking
    assert world.pool.usable == 1
    assert not world.pool.growing


def test_the_schedule_pauses_for_rows_on_their_way_and_for_no_other() -> None:
    """Not for memory that was refused, and never for longer than a second."""
    world = World()
    pool = world.pool
    assert not pool.paused(short=True)
    pool.end_step(4, changed=True)
    assert not pool.paused(short=False)
    assert pool.paused(short=True)
    assert pool.expected == CHUNKS
    world.now += 0.9 * PATIENCE_SECONDS
    assert pool.paused(short=True)
    pool.report(PoolState(5))
    assert not pool.paused(short=True)
    assert (pool.pauses, pool.paused_seconds) == (1, pytest.approx(0.9 * PATIENCE_SECONDS))
    pool.end_step(8, changed=True)
    assert pool.paused(short=True)
    world.now += 1.1 * PATIENCE_SECONDS
    assert not pool.paused(short=True)
    pool.report(PoolState(5, refused=1))
    assert not pool.growing
    assert pool.expected == 5, "nobody is admitted for what was refused"


def test_ranks_take_their_chunks_of_the_same_memory() -> None:
    """Four ranks: where five chunks are free, each may have one more."""
    world = World(ranks=4)
    world.free = FREE_MARGIN + 5 * CHUNK_BYTES
    assert world.step(4, seconds=2).chunks == 4
    assert World().step(4, seconds=2).chunks == 5


def test_scarce_memory_limits_what_may_be_used() -> None:
    """The pool takes what is free less the margin, and takes more when there is more."""
    world = World()
    world.free = FREE_MARGIN + 3 * CHUNK_BYTES
    assert world.step(2, seconds=2).chunks == 3
    assert world.pool.ceiling == 1 + 3, "one was there"
    assert world.pool.scarce
    world.free = FREE_MARGIN
    assert world.step(3, seconds=2).chunks == 3
    assert world.pool.usable == 3
    world.free = FREE_MARGIN + 40 * CHUNK_BYTES
    assert world.step(3, seconds=2).chunks == 4
    assert not world.pool.scarce


def test_it_gives_back_at_once_when_memory_is_gone() -> None:
    """What is ahead goes without waiting for the idle time; what is held stays."""
    world = World()
    assert world.step(10).chunks == 12
    world.free = FREE_MARGIN - 50 * CHUNK_BYTES
    assert world.step(10, seconds=2).chunks == 10
    assert world.pool.usable == 10


def test_the_longest_request_is_served_however_scarce_memory_is() -> None:
    """Otherwise it would wait for ever."""
    world = World(least_blocks=33)
    world.free = 0
    world.step(1, seconds=2)
    assert world.pool.ceiling == 5


def test_memory_refused_to_a_worker_is_not_asked_for_again_at_once() -> None:
    """Registration may fail where the system says that memory is free."""
    world = World()
    world.step(4)
    world.pool.report(PoolState(4, refused=1))
    world.now += 2
    assert world.step(4).chunks == 4
    assert world.step(4, seconds=40).chunks == 5


@given(
    st.integers(1, 170),
    st.lists(
        st.tuples(st.integers(0, CHUNKS), st.floats(0.01, 100), st.integers(-4, 30)), max_size=60
    ),
)
def test_what_is_held_is_always_ordered_and_usable(
    least: int, steps: list[tuple[int, float, int]]
) -> None:
    """Whatever happens, and never more than the ceiling."""
    world = World(least)
    for wanted, seconds, room in steps:
        world.free = FREE_MARGIN + room * CHUNK_BYTES
        held = min(wanted, world.pool.usable)
        order = world.step(held, seconds=seconds)
        assert max(held, 1) <= order.chunks <= CHUNKS
        assert max(held, 1) <= world.pool.usable <= order.chunks
        assert order.chunks <= max(world.pool.ceiling, held)


class Worker:
    """Follows orders at its own pace, late or early, and uses its leave when it likes."""

    def __init__(self) -> None:
        self.chunks = 1
        self.order = PoolOrder(1)
        self.released = self.refused = 0
        self.kept = 0  # Rows of chunks beyond the first that hold what was stored.

    def act(self, choice: int) -> None:
        """Something beside the steps."""
        if choice == 0 and self.order.idle and self.chunks > 1:
            self.chunks, self.kept, self.released = 1, 0, self.released + 1
        elif choice == 1 and self.chunks < self.order.chunks:
            self.chunks += 1
        elif choice == 2 and self.chunks < self.order.chunks:
            self.refused += 1

    def run(self, named: int, stored: int, order: PoolOrder) -> PoolState:
        """A step that names rows of the first ``named`` chunks, and stores to some."""
        assert named <= self.chunks, "a step names a row that is not there"
        assert named <= max(self.kept, stored, 1), "a step names a row that was given back"
        self.kept = max(self.kept, stored)
        self.order, self.chunks = order, min(self.chunks, order.chunks)
        self.kept = min(self.kept, self.chunks)
        return PoolState(self.chunks, self.refused, order.number, self.released)


@given(st.data(), st.integers(1, 2), st.booleans())
def test_no_step_names_a_row_that_is_not_there(
    data: st.DataObject, in_flight: int, scarce: bool
) -> None:
    """Under any delay of either side: steps run, and reports arrive, as late as can be."""
    world, worker = World(), Worker()
    pool = world.pool
    held = 0
    planned: list[tuple[int, int, PoolOrder]] = []
    reports: list[PoolState] = []
    for _ in range(data.draw(st.integers(1, 60))):
        for choice in data.draw(st.lists(st.integers(0, 2), max_size=3)):
            worker.act(choice)
        if planned and (len(planned) >= in_flight or data.draw(st.booleans())):
            reports.append(worker.run(*planned.pop(0)))
            worker.act(data.draw(st.integers(0, 3)))
        while reports and (len(reports) + len(planned) >= in_flight or data.draw(st.booleans())):
            pool.report(reports.pop(0))
        if len(planned) + len(reports) >= in_flight:
            continue
        world.now += data.draw(st.sampled_from([0.01, 2.0, 61.0]))
        world.free = FREE_MARGIN + (data.draw(st.integers(-3, 6)) if scarce else 30) * CHUNK_BYTES
        if pool.begin_step(held):
            held = 0
        named = stored = 0
        idle = data.draw(st.booleans())
        if not (pool.paused(short=False) or idle):
            now = data.draw(st.integers(0, pool.usable))
            named, stored = max(held, now), now if now > held else 0
            held = now
        planned.append((named, stored, pool.end_step(held, changed=True, idle=idle)))

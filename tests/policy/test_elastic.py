"""ElasticPool: enough for what is used, ahead of it, within free memory, and back when idle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.policy.elastic import FREE_MARGIN, LOOK_STEPS, ElasticPool, PoolOrder, PoolState
from pie_vllm.policy.geometry import Geometry

GEOMETRY = Geometry(4, 4096, 20, 160, 2, 160, 8, 4096)
CHUNKS = 20
CHUNK_BYTES = 8 * GEOMETRY.row_bytes


class World:
    """A clock and free memory that a test sets."""

    def __init__(self, least_blocks: int = 1) -> None:
        self.now = 100.0
        self.free = FREE_MARGIN + CHUNKS * CHUNK_BYTES
        self.pool = ElasticPool(
            GEOMETRY, least_blocks, lambda: self.free, lambda: self.now, idle_seconds=60.0
        )

    def step(self, held: int, *, seconds: float = 0.1, in_use: bool | None = None) -> PoolOrder:
        """A step after some time, at whose end so many chunks are held."""
        self.now += seconds
        self.pool.begin_step()
        order = self.pool.end_step(
            held, in_use=held > 0 if in_use is None else in_use, changed=True
        )
        self.pool.report(PoolState(order.chunks))
        return order


def test_one_chunk_while_nothing_is_pooled() -> None:
    """Orders do not change either, so the workers have nothing to do."""
    world = World()
    first = world.step(0)
    assert first == PoolOrder(1, idle=True)
    assert all(world.step(0) is first for _ in range(5))


def test_steps_that_change_nothing_look_now_and_then() -> None:
    """What they would see was seen; a worker's refusal is looked at in the next one."""
    world = World()
    first = world.step(4)
    world.now += 1000.0
    assert world.pool.end_step(4, in_use=True, changed=False) is first
    world.free = FREE_MARGIN
    world.pool.report(PoolState(4, refused=1))
    assert world.pool.end_step(4, in_use=True, changed=False).chunks == 4
    world.pool.report(PoolState(4, refused=1))
    world.free, world.now = FREE_MARGIN + CHUNKS * CHUNK_BYTES, world.now + 1000.0
    orders = [world.pool.end_step(4, in_use=True, changed=False) for _ in range(LOOK_STEPS)]
    assert {order.chunks for order in orders} == {4, 5}


@pytest.mark.parametrize(("held", "chunks"), [(1, 2), (7, 8), (8, 10), (16, 19), (20, 20)])
def test_it_is_ahead_by_a_chunk_and_an_eighth(held: int, chunks: int) -> None:
    """So that a step rarely waits for its chunk, and not beyond the ceiling."""
    assert World().step(held) == PoolOrder(chunks, idle=False)


def test_it_shrinks_to_the_peak_of_the_idle_time() -> None:
    """Not at once, and not below what was needed meanwhile."""
    world = World()
    assert world.step(16).chunks == 19
    assert world.step(2, seconds=1).chunks == 19
    assert world.step(6, seconds=30).chunks == 19
    assert world.step(2, seconds=29).chunks == 7
    assert world.step(2, seconds=61).chunks == 3


def test_an_idle_pool_counts_as_gone_before_the_workers_give_it_back() -> None:
    """Cached KV is forgotten after the idle time, and not while a request has some there."""
    world = World()
    assert world.step(10).chunks == 12
    world.now += 1000
    assert not world.pool.begin_step(), "a request holds blocks"
    assert world.step(10, in_use=False) == PoolOrder(12, idle=True)
    world.now += 59
    assert not world.pool.begin_step()
    world.pool.end_step(10, in_use=False, changed=True)
    world.now += 60
    assert world.pool.begin_step()
    assert world.pool.order == PoolOrder(1, idle=True)


def test_scarce_memory_limits_what_may_be_used() -> None:
    """The pool takes what is free less the margin, and takes more when there is more."""
    world = World()
    world.free = FREE_MARGIN + 3 * CHUNK_BYTES
    assert world.step(2, seconds=2).chunks == 3
    assert world.pool.usable == 1 + 3, "one was there"
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
    assert world.pool.usable == 5


def test_memory_refused_to_a_worker_is_not_asked_for_again_at_once() -> None:
    """Registration may fail where the system says that memory is free."""
    world = World()
    world.step(4)
    world.pool.report(PoolState(4, refused=1))
    world.now += 2
    world.pool.begin_step()
    assert world.pool.end_step(4, in_use=True, changed=True).chunks == 4
    world.now += 40
    world.pool.begin_step()
    assert world.pool.end_step(4, in_use=True, changed=True).chunks == 5


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
        assert max(held, 1) <= world.pool.usable <= CHUNKS
        assert order.chunks <= max(world.pool.usable, held)
        assert order.idle == (held == 0)

"""Board: the leader reports what all ranks hold, and no rank waits for another."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest
from torch.distributed import HashStore

from pie_vllm.engine.pool_board import NEVER, Board
from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.errors import TransferError
from pie_vllm.plan import PoolOrder, PoolState

RANKS = 3


class Chunks:
    """What a rank holds; it has no memory beyond ``most``, and is slow."""

    def __init__(self, most: int = 100, seconds: float = 0.0) -> None:
        self.held = {0}
        self.most = most
        self.seconds = seconds

    def commit_chunk(self, chunk: int) -> None:
        time.sleep(self.seconds)
        if chunk >= self.most:
            raise TransferError("no memory.")
        self.held.add(chunk)

    def release_chunk(self, chunk: int) -> None:
        time.sleep(self.seconds)
        self.held.remove(chunk)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


Make = Callable[..., list[PoolKeeper]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes the keepers of all ranks, the leader's first."""
    keepers: list[PoolKeeper] = []

    def made(*chunks: Chunks, idle_seconds: float = 60.0) -> list[PoolKeeper]:
        store = HashStore()
        for rank, held in enumerate(chunks):
            board = Board(store, rank, len(chunks), "test")
            keepers.append(PoolKeeper(held, 4, idle_seconds=idle_seconds, board=board))
        return keepers

    yield made
    for keeper in keepers:
        keeper.close()


def test_the_slowest_rank_counts(make: Make) -> None:
    """What the leader reports is held by all, at any time, and in the end it is all of it."""
    chunks = [Chunks(), Chunks(seconds=0.02), Chunks(seconds=0.01)]
    keepers = make(*chunks)
    for keeper in keepers:
        keeper.follow(PoolOrder(6))
    while (state := keepers[0].state).chunks < 6:
        assert all(held.held >= set(range(state.chunks)) for held in chunks)
    assert keepers[1].state.chunks == 6


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_refusal_on_any_rank_is_heard(make: Make, rank: int) -> None:
    """The pool is as large as on the rank that has the least."""
    chunks = [Chunks() for _ in range(RANKS)]
    chunks[rank].most = 3
    keepers = make(*chunks)
    for keeper in keepers:
        keeper.follow(PoolOrder(6))
    until(lambda: keepers[0].state == PoolState(3, refused=1))


def test_a_rank_that_is_behind_does_not_hold_up_the_others(make: Make) -> None:
    """Nor does its silence let the leader count on anything of it."""
    keepers = make(Chunks(), Chunks())
    keepers[0].follow(PoolOrder(6))
    until(lambda: keepers[0].held == 6)
    time.sleep(0.1)
    assert keepers[0].state.chunks == 1
    keepers[1].follow(PoolOrder(6))
    until(lambda: keepers[0].state.chunks == 6)
    keepers[0].follow(PoolOrder(2, number=1))
    keepers[0].follow(PoolOrder(5, number=1))
    until(lambda: keepers[0].held == 5)
    time.sleep(0.1)
    assert keepers[0].state == PoolState(2, number=1), "the other's note is of an older order"
    keepers[1].follow(PoolOrder(2, number=1))
    keepers[1].follow(PoolOrder(5, number=1))
    until(lambda: keepers[0].state == PoolState(5, number=1))


def test_only_the_leader_uses_a_leave_and_the_others_follow(make: Make) -> None:
    """A rank that has the leave later gives back later; one without it keeps all."""
    chunks = [Chunks(), Chunks(), Chunks()]
    keepers = make(*chunks, idle_seconds=0.05)
    for keeper in keepers:
        keeper.follow(PoolOrder(4))
    until(lambda: keepers[0].state.chunks == 4)
    for keeper in keepers[1:]:
        keeper.follow(PoolOrder(4, idle=True))
    time.sleep(0.3)
    assert [len(held.held) for held in chunks] == [4, 4, 4], "the leader has no leave yet"
    keepers[2].follow(PoolOrder(4, number=1))
    keepers[0].follow(PoolOrder(4, idle=True))
    until(lambda: [len(held.held) for held in chunks] == [1, 1, 4])
    assert keepers[0].state == PoolState(1, released=1)
    for number, count in ((1, 4), (2, 3)):
        for keeper in keepers:
            keeper.follow(PoolOrder(count, number=number))
    until(lambda: keepers[0].state == PoolState(3, number=2, released=1))
    until(lambda: [len(held.held) for held in chunks] == [3, 3, 3])


def test_orders_at_random_on_ranks_of_their_own_pace(make: Make) -> None:
    """What the leader reports under a number is held by a rank that follows it, too."""
    rng = random.Random(5)
    chunks = [Chunks(), Chunks(seconds=0.0005)]
    keepers = make(*chunks)
    order = PoolOrder(1)
    late: list[PoolOrder] = []
    for _ in range(1000):
        wanted = rng.randint(1, 9)
        order = PoolOrder(wanted, number=order.number + (wanted < order.chunks))
        late.append(order)
        keepers[0].follow(order)
        while late and rng.random() < 0.7:
            keepers[1].follow(late.pop(0))
        state = keepers[0].state
        time.sleep(rng.choice([0, 0, 0.001]))
        for behind in late:
            keepers[1].follow(behind)
        late.clear()
        assert chunks[1].held >= set(range(state.chunks))


def test_a_store_that_fails_ends_nothing() -> None:
    """The rank that held it is gone; the leader counts on what it knew."""

    store = Mock()
    store.set.side_effect = RuntimeError("connection refused")
    board = Board(store, 0, 2, "test")
    board.release(PoolOrder(3, idle=True))
    assert board.exchange(PoolState(3), idle=False) < NEVER
    assert not board.news(PoolState(3)), "it would be tried again without a pause"
    assert board.least(PoolState(3)).chunks == 1

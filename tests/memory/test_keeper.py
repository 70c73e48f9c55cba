"""PoolKeeper: chunks come and go beside the steps, and a step never finds one missing."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pie_vllm.errors import TransferError
from pie_vllm.memory.keeper import PoolKeeper
from pie_vllm.policy.elastic import PoolOrder
from pie_vllm.policy.plan import Copy

ROWS = 4


class Chunks:
    """Notes what is held; takes some time, or has no memory beyond ``most``."""

    def __init__(self, most: int = 100, seconds: float = 0.0) -> None:
        self.held = {0}
        self.most = most
        self.seconds = seconds
        self.threads: set[str] = set()
        self.niceness = 0

    def commit_chunk(self, chunk: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.niceness = niceness()
        time.sleep(self.seconds)
        assert chunk not in self.held
        if chunk >= self.most:
            raise TransferError("no memory")
        self.held.add(chunk)

    def release_chunk(self, chunk: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.held.remove(chunk)


def niceness() -> int:
    """Of the calling thread; higher is less urgent."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def stores(chunk: int) -> list[Copy]:
    """A store to a row of a chunk."""
    return [Copy(0, chunk * ROWS + 1, 2)]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


@pytest.fixture
def make() -> Iterator[Callable[..., PoolKeeper]]:
    """Makes keepers, and ends them."""
    keepers: list[PoolKeeper] = []

    def made(chunks: Chunks, idle_seconds: float = 60.0) -> PoolKeeper:
        keepers.append(PoolKeeper(chunks, ROWS, idle_seconds=idle_seconds))
        return keepers[-1]

    yield made
    for keeper in keepers:
        keeper.close()


def test_it_follows_orders_in_a_thread_of_its_own(make: Callable[..., PoolKeeper]) -> None:
    """Up and down; the engine's thread takes and gives nothing."""
    chunks = Chunks()
    keeper = make(chunks)
    for count in (5, 2, 7, 1):
        keeper.follow(PoolOrder(count, idle=False))
        until(lambda count=count: chunks.held == set(range(count)))
        assert keeper.state.chunks == count
    assert chunks.threads == {"pie-pool"}
    assert keeper.waits == 0


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux")
def test_growing_takes_no_core_from_a_step(make: Callable[..., PoolKeeper]) -> None:
    """The thread that fills fresh memory steps back behind those that compute."""
    chunks = Chunks()
    keeper = make(chunks)
    keeper.follow(PoolOrder(2, idle=False))
    until(lambda: keeper.state.chunks == 2)
    assert chunks.niceness > niceness()


def test_a_step_waits_for_the_chunk_that_it_stores_to(make: Callable[..., PoolKeeper]) -> None:
    """And for no other reason."""
    chunks = Chunks(seconds=0.01)
    keeper = make(chunks)
    keeper.prepare([])
    keeper.prepare(stores(0))
    assert keeper.waits == 0
    keeper.prepare([*stores(3), *stores(1)])
    assert chunks.held >= {0, 1, 2, 3}
    assert keeper.waits == 1
    assert keeper.waited_seconds >= 0.03


def test_following_and_waiting_at_random_never_misses_a_chunk(
    make: Callable[..., PoolKeeper],
) -> None:
    """A chunk on its way out is taken again before a step names it."""
    rng = random.Random(0)
    chunks = Chunks()
    keeper = make(chunks)
    for _ in range(2000):
        wanted = rng.randrange(8)
        keeper.prepare(stores(wanted))
        assert wanted in chunks.held
        keeper.follow(PoolOrder(rng.randint(wanted + 1, 9), idle=False))


def test_memory_that_cannot_be_had_is_said_once(
    make: Callable[..., PoolKeeper], caplog: pytest.LogCaptureFixture
) -> None:
    """An order is followed as far as it goes; only a step that needs the chunk fails."""
    keeper = make(Chunks(most=3))
    with caplog.at_level(logging.WARNING, logger="vllm.pie"):
        logging.getLogger("vllm.pie").propagate = True
        for count in (6, 7):
            refused = keeper.state.refused
            keeper.follow(PoolOrder(count, idle=False))
            until(lambda refused=refused: keeper.state.refused > refused)
    assert keeper.state.chunks == 3
    assert [r.getMessage() for r in caplog.records] == [
        "Pie: the CPU pool stays at 3 chunks, because memory for one more cannot be had: no memory"
    ]
    keeper.prepare(stores(2))
    with pytest.raises(TransferError, match="lower --pie-pool-gib"):
        keeper.prepare(stores(3))


@pytest.mark.alone
def test_an_idle_pool_goes_after_twice_the_idle_time(make: Callable[..., PoolKeeper]) -> None:
    """All but the first chunk, without any step; steps put it off, live requests forbid it."""
    chunks = Chunks()
    keeper = make(chunks, idle_seconds=0.8)  # A busy machine may hold a thread up for a second.
    keeper.follow(PoolOrder(4, idle=False))
    time.sleep(2.0)
    assert chunks.held == {0, 1, 2, 3}
    order = PoolOrder(4, idle=True)
    for _ in range(8):
        keeper.follow(order)
        time.sleep(0.25)
        assert chunks.held == {0, 1, 2, 3}
    until(lambda: chunks.held == {0})
    keeper.prepare(stores(2))
    assert chunks.held == {0, 1, 2}


def test_nothing_comes_or_goes_while_it_is_paused() -> None:
    """What is under way ends first; what was ordered meanwhile follows."""
    chunks = Chunks(seconds=0.05)
    keeper = PoolKeeper(chunks, ROWS, idle_seconds=100)
    keeper.follow(PoolOrder(4, False))
    until(lambda: bool(chunks.threads))  # The first is on its way.
    with keeper.paused():
        held = set(chunks.held)
        assert len(held) > 1
        time.sleep(0.2)
        assert chunks.held == held != {0, 1, 2, 3}
    until(lambda: chunks.held == {0, 1, 2, 3})
    with keeper.paused():
        keeper.follow(PoolOrder(2, False))
        time.sleep(0.1)
        assert chunks.held == {0, 1, 2, 3}
    until(lambda: chunks.held == {0, 1})
    keeper.close()

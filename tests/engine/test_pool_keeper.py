"""PoolKeeper: chunks come and go by order alone, beside the steps, and no step waits for one."""

from __future__ import annotations

import logging
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pie_vllm.config import PieConfig
from pie_vllm.engine import pool_keeper as keeper_module
from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.errors import IntegrityError, TransferError
from pie_vllm.plan import NO_RUNS, Copy, PoolOrder, PoolState, Runs
from pie_vllm.plan import runs as array

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
    """Niceness of the calling thread; higher is less urgent."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def stores(chunk: int) -> Runs:
    """A store to a row of a chunk."""
    return array([Copy(0, chunk * ROWS + 1, 2)])


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

    def made(chunks: Chunks, idle_seconds: float = 60.0, **options: Any) -> PoolKeeper:
        keepers.append(PoolKeeper(chunks, ROWS, idle_seconds=idle_seconds, **options))
        return keepers[-1]

    yield made
    for keeper in keepers:
        keeper.close()


def test_it_follows_orders_in_a_thread_of_its_own(make: Callable[..., PoolKeeper]) -> None:
    """Up and down; the engine's thread takes and gives nothing."""
    chunks = Chunks()
    keeper = make(chunks)
    for count in (5, 2, 7, 1):
        keeper.follow(PoolOrder(count))
        until(lambda count=count: chunks.held == set(range(count)))
        assert keeper.state.chunks == count
    assert chunks.threads == {"pie-pool"}


def test_first_chunks_are_held_from_the_start_and_stay(make: Callable[..., PoolKeeper]) -> None:
    """They are not taken again, a step may name their rows at once, and leave spares them."""
    chunks = Chunks()
    chunks.held = {0, 1, 2}
    keeper = make(chunks, idle_seconds=0.05, first_chunks=3)
    assert keeper.state == PoolState(3)
    keeper.prepare(stores(2))
    keeper.follow(PoolOrder(5))
    until(lambda: keeper.state.chunks == 5)
    keeper.follow(PoolOrder(5, idle=True))
    until(lambda: chunks.held == {0, 1, 2})
    assert keeper.state == PoolState(3, released=1)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux")
def test_growing_takes_no_core_from_a_step(make: Callable[..., PoolKeeper]) -> None:
    """The thread that fills fresh memory steps back behind those that compute."""
    chunks = Chunks()
    keeper = make(chunks)
    keeper.follow(PoolOrder(2, idle=False))
    until(lambda: keeper.state.chunks == 2)
    assert chunks.niceness > niceness()


def test_a_step_that_names_a_row_which_is_not_held_is_refused_at_once(
    make: Callable[..., PoolKeeper],
) -> None:
    """Whatever copies it: stores, promotions or loads. It waits for nothing."""
    keeper = make(Chunks(seconds=0.3))
    keeper.prepare(NO_RUNS, NO_RUNS, None)
    keeper.prepare(stores(0), stores(0), stores(0))
    keeper.follow(PoolOrder(3))
    both = np.concatenate((stores(0), stores(1)))
    for runs in ((stores(2), NO_RUNS, None), (NO_RUNS, stores(1), None), (NO_RUNS, NO_RUNS, both)):
        with pytest.raises(IntegrityError, match=r"row \d+ of the CPU pool.*first 1 are held"):
            keeper.prepare(*runs)
    until(lambda: keeper.state.chunks == 3)
    keeper.prepare(stores(2), stores(1))
    keeper.follow(PoolOrder(2, number=1))
    with pytest.raises(IntegrityError, match="first 2 are held"):
        keeper.prepare(stores(2))


def test_what_is_reported_is_held_until_an_order_of_a_higher_number(
    make: Callable[..., PoolKeeper],
) -> None:
    """Orders at random: between two that take something back, what was reported stays."""
    rng = random.Random(0)
    chunks = Chunks()
    keeper = make(chunks)
    order = PoolOrder(1)
    for _ in range(2000):
        wanted = rng.randint(1, 9)
        order = PoolOrder(wanted, number=order.number + (wanted < order.chunks))
        keeper.follow(order)
        state = keeper.state
        assert state.number == order.number
        time.sleep(rng.choice([0, 0, 0.0005]))
        assert chunks.held >= set(range(state.chunks))


def test_an_equal_order_that_was_sent_anew_changes_nothing(
    make: Callable[..., PoolKeeper],
) -> None:
    """Each step's order is another object: a worker unpickles it."""
    heard: list[PoolOrder] = []
    board = SimpleNamespace(
        leads=True,
        follow=heard.append,
        news=lambda _: False,
        exchange=lambda *_, **__: 3600.0,
        least=lambda own: own,
    )
    keeper = make(Chunks(), board=board)
    order = PoolOrder(2)
    for _ in range(3):
        keeper.follow(pickle.loads(pickle.dumps(order)))
    assert heard == [order]


def test_memory_that_cannot_be_had_is_said_once_and_tried_again(
    make: Callable[..., PoolKeeper],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An order is followed as far as it goes, and further once there is memory."""
    monkeypatch.setattr(keeper_module, "RETRY_SECONDS", 0.05)
    chunks = Chunks(most=3)
    keeper = make(chunks)
    with caplog.at_level(logging.WARNING, logger="vllm.pie"):
        logging.getLogger("vllm.pie").propagate = True
        keeper.follow(PoolOrder(6))
        until(lambda: keeper.state.refused > 2)
    assert keeper.state.chunks == 3
    assert [r.getMessage() for r in caplog.records] == [
        "Pie: the CPU pool stays at 3 chunks for now, because memory for one more cannot be had: "
        "no memory Requests wait or are preempted for what is missing. Free CPU memory, or lower "
        "--pie-pool-gib."
    ]
    keeper.prepare(stores(2))
    chunks.most = 100
    until(lambda: keeper.state.chunks == 6)
    assert chunks.held == set(range(6))


def test_the_budget_refuses_a_chunk(make: Callable[..., PoolKeeper]) -> None:
    """It is asked around each chunk, and nothing is taken that it refuses."""
    left = [2]

    @contextmanager
    def budget() -> Iterator[None]:
        if not left[0]:
            raise TransferError("no budget")
        yield
        left[0] -= 1

    chunks = Chunks()
    keeper = make(chunks, budget=budget)
    keeper.follow(PoolOrder(5))
    until(lambda: keeper.state.refused == 1)
    assert chunks.held == {0, 1, 2}


def test_nothing_goes_without_leave(make: Callable[..., PoolKeeper]) -> None:
    """However long no order comes, and however late a step is."""
    chunks = Chunks()
    keeper = make(chunks, idle_seconds=0.01)
    keeper.follow(PoolOrder(4))
    until(lambda: keeper.state.chunks == 4)
    time.sleep(0.3)
    assert keeper.state == PoolState(4)
    keeper.prepare(stores(3))


@pytest.mark.alone
def test_with_leave_all_but_the_first_go_after_the_idle_time(
    make: Callable[..., PoolKeeper],
) -> None:
    """An order without leave takes it back; once used, every later report says so."""
    chunks = Chunks()
    keeper = make(chunks, idle_seconds=0.8)  # A busy machine may hold a thread up for a second.
    keeper.follow(PoolOrder(4))
    until(lambda: keeper.state.chunks == 4)
    for number in range(6):
        keeper.follow(PoolOrder(4, idle=True, number=number))
        time.sleep(0.2)
        keeper.follow(PoolOrder(4, number=number + 1))
    time.sleep(1.2)
    assert chunks.held == {0, 1, 2, 3}
    assert keeper.state == PoolState(4, number=6)
    keeper.follow(PoolOrder(4, idle=True, number=6))
    until(lambda: chunks.held == {0})
    assert keeper.state == PoolState(1, number=6, released=1)
    for _ in range(2):
        keeper.follow(PoolOrder(4, number=7))
        time.sleep(0.05)
        assert keeper.state == PoolState(1, number=7, released=1), "the scheduler has not heard yet"
    keeper.follow(PoolOrder(2, number=8))
    until(lambda: keeper.state == PoolState(2, number=8, released=1))


def test_an_idle_time_is_heard_of_whenever_it_begins(make: Callable[..., PoolKeeper]) -> None:
    """Also while a chunk is being taken, and while steps that store come with the same order."""
    chunks = Chunks(seconds=0.02)
    keeper = make(chunks, idle_seconds=0.1)
    keeper.follow(PoolOrder(3))
    for _ in range(20):
        keeper.prepare(stores(0))
        time.sleep(0.01)
        keeper.follow(PoolOrder(3))
    keeper.follow(PoolOrder(5))
    keeper.follow(PoolOrder(5, idle=True))
    until(lambda: chunks.held == {0} and keeper.state.released == 1)


@pytest.mark.parametrize("seconds", [4.7e9, 1e10, 9.3e18])
def test_an_idle_time_longer_than_a_thread_can_wait(
    make: Callable[..., PoolKeeper], seconds: float
) -> None:
    """It is waited for in pieces, and the thread goes on with orders."""
    idle = PieConfig.from_mapping({"pool_idle_seconds": seconds}).pool_idle_seconds
    keeper = make(Chunks(), idle_seconds=idle)
    keeper.follow(PoolOrder(3, idle=True))
    until(lambda: keeper.state.chunks == 3)
    time.sleep(0.05)
    keeper.follow(PoolOrder(5, number=1))
    until(lambda: keeper.state.chunks == 5)


def test_nothing_comes_or_goes_while_it_is_paused(make: Callable[..., PoolKeeper]) -> None:
    """What is under way ends first; what was ordered meanwhile follows."""
    chunks, everything = Chunks(seconds=0.05), set(range(9))
    keeper = make(chunks)
    keeper.follow(PoolOrder(9))
    until(lambda: bool(chunks.threads))  # The first is on its way.
    with keeper.paused():
        held = set(chunks.held)
        assert len(held) > 1
        time.sleep(0.2)
        assert chunks.held == held != everything
    until(lambda: chunks.held == everything)
    with keeper.paused():
        keeper.follow(PoolOrder(2, number=1))
        time.sleep(0.1)
        assert chunks.held == everything
    until(lambda: chunks.held == {0, 1})

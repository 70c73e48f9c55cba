"""The two schedulers of `benchmarks.scheduler_cost` while chats come and go over a full pool."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from operator import add
from statistics import median
from time import thread_time_ns
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from benchmarks.real import bare_schedulers
from benchmarks.real.scheduler_side import (
    BLOCK_SIZE,
    REQUESTS,
    PieSide,
    Side,
    difference_of,
    two_sides,
)
from pie_vllm.geometry import Geometry

RESIDENTS = 14_000
POOLED = 64
COMING = 4
"""Chats that come in each step; each ends with its first token, so as many leave."""

CHAT_BLOCKS = 32
FILLING_STEPS = 16
FILLING = 64
"""Most that come in one of those steps."""

STEPS_MAX = 32
"""With more, chats would be evicted before they come where ten thousand blocks are parked."""


def pool_of(parked: int) -> Geometry:
    """Tiers whose pool has rows for so many parked blocks."""
    return bare_schedulers.geometry(RESIDENTS, POOLED, parked, chunk_rows=4096)


class Admitted(NamedTuple):
    """Requests admitted, and the nanoseconds that took: looks into the prefix cache, allocations.

    Each look and allocation holds the time of reading the clock once.
    """

    count: int = 0  # type: ignore[assignment]  # the word for it, over tuple.count
    lookup: int = 0
    allocation: int = 0


class Admissions:
    """Times what a scheduler's block manager does for waiting requests."""

    def __init__(self, manager: Any) -> None:
        """From now on; pie's manager has a method of its own for their blocks."""
        self._so_far = Admitted()
        own = hasattr(manager, "_admit")
        computed = manager.get_computed_blocks
        allocate = manager._admit if own else manager.allocate_slots

        def get_computed_blocks(*args: Any, **kwargs: Any) -> Any:
            start = thread_time_ns()
            found = computed(*args, **kwargs)
            self._add(lookup=thread_time_ns() - start)
            return found

        def admit(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("new_computed_blocks") is None:
                return allocate(*args, **kwargs)
            start = thread_time_ns()
            blocks = allocate(*args, **kwargs)
            self._add(blocks is not None, allocation=thread_time_ns() - start)
            return blocks

        manager.get_computed_blocks = get_computed_blocks
        setattr(manager, "_admit" if own else "allocate_slots", admit)

    def _add(self, *more: int, **times: int) -> None:
        added = Admitted(*more, **times)
        self._so_far = Admitted(*map(add, self._so_far, added))

    def take(self) -> Admitted:
        """Since this was asked last."""
        taken, self._so_far = self._so_far, Admitted()
        return taken


class Chats:
    """Prompts of whole blocks and one token, and answers of one token."""

    def __init__(self, side: Side, first: int = 0) -> None:
        """Numbered from ``first``; chats of one number are the same on both sides."""
        self._side = side
        self._number = first

    def request(self, number: int) -> Any:
        """The chat of a number."""
        prompt = [(number * 31 + token) % 997 for token in range(CHAT_BLOCKS * BLOCK_SIZE + 1)]
        prompt[:2] = [number % 991, 1000 + number // 991]
        return bare_schedulers.make_request(f"chat{number}", prompt, 1, BLOCK_SIZE)

    def come(self, count: int) -> None:
        """The next chats wait for the coming step."""
        for _ in range(count):
            self._side.scheduler.add_request(self.request(self._number))
            self._number += 1


def use_all_blocks(side: Side) -> None:
    """Other chats come and go until all free blocks are those of the prefix cache."""
    others = Chats(side, first=100_000)
    for _ in range(FILLING_STEPS):
        others.come(2 * (RESIDENTS + POOLED) // (FILLING_STEPS * CHAT_BLOCKS))
        side.step()
    assert len(side.scheduler.running) == REQUESTS


def fill_pool(side: PieSide, chats: int) -> None:
    """Park in all rows: KV that nobody asks for first, so that it goes first, then the chats'."""
    parking, rows = side.residency.parking, side.residency.rows
    pool, chunks_of_all = side.scheduler.pie_controller.pool, side.residency.geometry.num_chunks
    # As the workers had taken and reported it all.
    pool.order = pool.order._replace(chunks=chunks_of_all)
    pool.usable = chunks_of_all
    side.residency.use_chunks(chunks_of_all)

    def park(key: Any) -> None:
        parking.evicted([SimpleNamespace(block_id=1, block_hash=key)])

    for make_key, count in _keys(side, chats, rows.num_free + len(parking)):
        for number in range(count):
            park(make_key(number))
            if number % 4096 == 0:
                parking.take()  # Nothing is stored: no worker is there.
    parking.take()
    assert not rows.num_free


def _keys(side: Side, chats: int, rows: int) -> list[tuple[Callable[[int], Any], int]]:
    blocks = [
        make_block_hash_with_group_id(block_hash, 0)
        for number in range(chats)
        for block_hash in Chats(side).request(number).block_hashes
    ]
    return [(lambda _: os.urandom(36), rows), (blocks.__getitem__, len(blocks))]


class ParkedCost(NamedTuple):
    """Chats that come back over a full pool; medians over steps, microseconds.

    ``admission`` is of one chat: the look into the prefix cache and the allocation of blocks.
    """

    stock_us: float
    pie_us: float
    difference_us: float
    difference_error_us: float
    stock_admission_us: float
    pie_admission_us: float
    pie_lookup_us: float
    parked: float
    stored_each: float
    restored_each: float


class ParkedSample(NamedTuple):
    """One step of both schedulers, nanoseconds; admissions are those of the step together."""

    stock: int
    pie: int
    stock_admissions: int
    pie_admissions: int
    pie_lookups: int
    parked: int
    stored: int
    restored: int


def parked_round(parked: int, steps: int, asynchronous: bool = True) -> list[ParkedSample]:
    """Steps over a pool with rows for so many parked blocks, all of them taken."""
    assert steps <= STEPS_MAX
    stock, pie = two_sides(
        pool_of(parked), steps, 1 + FILLING_STEPS // steps, asynchronous, others=FILLING
    )
    for side in (stock, pie):
        use_all_blocks(side)
    fill_pool(pie, COMING * steps)
    timed = {side: Admissions(side.scheduler.kv_cache_manager) for side in (stock, pie)}
    chats = [Chats(side) for side in (stock, pie)]
    parking, samples = pie.residency.parking, []
    gc.collect()
    gc.freeze()
    try:
        for turn in range(steps):
            for each in chats:
                each.come(COMING)
            before = parking.parked_blocks, parking.restored_blocks
            times = {side: side.step() for side in ((stock, pie) if turn % 2 else (pie, stock))}
            took = {side: timed[side].take() for side in timed}
            assert all(one.count == COMING for one in took.values()), "a chat had to wait"
            restored = parking.restored_blocks - before[1]
            assert restored == COMING * CHAT_BLOCKS, "a block was not parked any more"
            samples.append(
                ParkedSample(
                    times[stock],
                    times[pie],
                    took[stock].lookup + took[stock].allocation,
                    took[pie].lookup + took[pie].allocation,
                    took[pie].lookup,
                    len(parking),
                    parking.parked_blocks - before[0],
                    restored,
                )
            )
    finally:
        gc.unfreeze()
    return samples


def parked_costs(parked: int, steps: int, rounds: int = 1, asynchronous: bool = True) -> ParkedCost:
    """Medians over several rounds."""
    samples = [s for _ in range(rounds) for s in parked_round(parked, steps, asynchronous)]
    difference, error = difference_of([(s.stock, s.pie) for s in samples])
    chats = COMING * len(samples)
    return ParkedCost(
        stock_us=median(s.stock for s in samples) / 1e3,
        pie_us=median(s.pie for s in samples) / 1e3,
        difference_us=difference,
        difference_error_us=error,
        stock_admission_us=median(s.stock_admissions for s in samples) / COMING / 1e3,
        pie_admission_us=median(s.pie_admissions for s in samples) / COMING / 1e3,
        pie_lookup_us=median(s.pie_lookups for s in samples) / COMING / 1e3,
        parked=sum(s.parked for s in samples) / len(samples),
        stored_each=sum(s.stored for s in samples) / chats,
        restored_each=sum(s.restored for s in samples) / chats,
    )

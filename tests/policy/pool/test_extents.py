"""Extents: no slot is taken twice, and what belongs together comes to lie together."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from pie_vllm.policy.pool.extents import CHAIN, Extents, extent_of


@pytest.mark.parametrize(("slots", "size"), [(1, 1), (7, 1), (64, 8), (61, 8), (90, 4), (3, 8)])
def test_random_takes_and_gives_keep_the_books(slots: int, size: int) -> None:
    """A free slot is found as long as there is one, and none beyond those that may be used."""
    rng = random.Random(slots)
    extents = Extents(slots, size)
    taken: set[int] = set()
    for _ in range(1500):
        if rng.random() < 0.05:
            extents.usable = rng.randint(max(taken, default=-1) + 1, slots)
        if taken and rng.random() < 0.5:
            slot = rng.choice(sorted(taken))
            extents.give(slot)
            taken.remove(slot)
        else:
            place = rng.randrange(4) * CHAIN + rng.randrange(40)
            offered = extents.offers(place)
            found = extents.take(place)
            assert (found is not None) == offered
            if found is not None:
                assert found % size == place % size
                assert extents.places_of([found]) == [place]
            else:
                found = extents.take_spare()
            free = [s for s in range(extents.usable) if s not in taken]
            assert (found is not None) == bool(free)
            if found is not None:
                assert found in free
                taken.add(found)
        assert extents.free_slots() == [s for s in range(slots) if s not in taken]
    extents.check_integrity()


def test_blocks_of_a_chain_lie_together_in_whatever_order_they_come() -> None:
    """Two chains at once, one from its end on, one from its start: each in extents of its own."""
    extents = Extents(64, 8)
    up, down = [], []
    for index in range(16):
        up.append(extents.take(CHAIN + index))
        down.append(extents.take(2 * CHAIN + 15 - index))
    for slots in (up, down[::-1]):
        for first in (0, 8):
            run = slots[first : first + 8]
            assert run == list(range(run[0], run[0] + 8))  # type: ignore[arg-type, operator]


def test_the_next_extent_of_a_chain_is_the_one_behind() -> None:
    """Then runs are longer than an extent."""
    extents = Extents(64, 8)
    extents.take(CHAIN)
    extents.take(2 * CHAIN + 8)
    assert extents.take(CHAIN + 8) == 16, "the one behind is another's"
    assert extents.take(2 * CHAIN + 16) == 24
    assert [extents.take(3 * CHAIN + i) for i in (0, 8, 16)] == [32, 40, 48]
    assert extents.take(4 * CHAIN + 8) == 56


def test_room_in_the_extent_of_another_is_used_last() -> None:
    """And an extent that is free again is for anybody."""
    extents = Extents(16, 4)
    assert [extents.take(chain * CHAIN) for chain in range(1, 5)] == [0, 4, 8, 12]
    assert extents.take(5 * CHAIN) is None
    assert extents.take_spare() == 1
    extents.give(8)
    assert extents.take(5 * CHAIN + 2) == 10
    assert extents.take(3 * CHAIN + 1) is None


@pytest.mark.parametrize(("slots", "size"), [(0, 1), (511, 1), (512, 2), (1516, 4), (10_299, 32)])
def test_small_spaces_have_small_extents(slots: int, size: int) -> None:
    """Several for each request; 32 slots at most."""
    assert extent_of(slots) == size


@pytest.mark.parametrize("seed", range(30))
def test_runs_are_taken_as_places_one_by_one(seed: int) -> None:
    """Whatever the places: rising, falling, of several chains, taken before, without a place."""
    rng = random.Random(seed)
    size = rng.choice([1, 4, 8])
    slots = size * rng.randrange(4, 12) + rng.randrange(size)
    one_by_one, together = Extents(slots, size), Extents(slots, size)
    both = (one_by_one, together)
    usable = rng.choice([slots, slots - rng.randrange(size + 1)])
    for extents in both:
        extents.usable = usable
    for _ in range(20):
        places: list[int | None] = []
        for _ in range(rng.randrange(1, 4)):
            first, count = (
                rng.randrange(2) * CHAIN + rng.randrange(3 * size),
                rng.randrange(3 * size),
            )
            places += [*range(first, first + count)][:: rng.choice([1, -1, 2])]
        if rng.random() < 0.2:
            places.append(None)
        expected: list[int] = []
        for place in places:
            slot = None if place is None else one_by_one.take(place)
            if slot is None:
                break
            expected.append(slot)
        assert [*chain.from_iterable(together.take_runs(places))] == expected
        taken = [slot for slot in range(slots) if not together.is_free(slot)]
        for slot in rng.sample(taken, len(taken) * rng.randrange(3) // 2):
            for extents in both:
                extents.give(slot)
        together.check_integrity()
        assert together.num_free == one_by_one.num_free

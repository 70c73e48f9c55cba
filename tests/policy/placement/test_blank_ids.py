"""BlankIds: neighbours get neighbouring ids, in the longest gap that there is."""

from __future__ import annotations

import random

import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.placement.blank_ids import BlankIds


def take(ids: BlankIds, place: int) -> int:
    """As the free queue does."""
    slot = ids.beside(place)
    if slot is None:
        slot, _ = ids.longest_gap()
    ids.take(slot, place)
    return slot


def test_neighbours_lie_side_by_side_whichever_comes_first() -> None:
    """From the start of a chain on, or from its end back to what is free."""
    ids = BlankIds(16)
    assert [take(ids, place) for place in (100, 101, 102)] == [0, 1, 2]
    assert take(ids, 500) == 3
    assert take(ids, 103) == 4, "the next one is another's"
    for slot in (1, 2):
        ids.give(slot)
    assert [take(ids, place) for place in (499, 498)] == [2, 1]


def test_a_new_chain_begins_in_the_longest_gap() -> None:
    """Where those that follow have room behind it."""
    ids = BlankIds(12)
    for place in range(12):
        take(ids, place)
    for slot in (1, 2, 5, 6, 7, 10):
        ids.give(slot)
    assert ids.longest_gap() == (5, 3)
    assert [take(ids, place) for place in (100, 101, 102)] == [5, 6, 7]
    assert ids.longest_gap() == (1, 2)


def test_random_takes_and_gives_keep_the_books() -> None:
    """A slot is blank or taken, and no place names another's."""
    rng = random.Random(5)
    ids = BlankIds(20)
    taken: set[int] = set()
    for _ in range(1000):
        if taken and (rng.random() < 0.5 or not ids.num_free):
            slot = rng.choice(sorted(taken))
            ids.give(slot)
            taken.remove(slot)
        else:
            slot = take(ids, rng.randrange(40))
            assert slot not in taken
            taken.add(slot)
        assert ids.free_slots() == [s for s in range(20) if s not in taken]
        ids.check_integrity()
    ids.num_free += 1
    with pytest.raises(IntegrityError, match="count of blank ids"):
        ids.check_integrity()

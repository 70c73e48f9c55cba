"""KeyTable and Chains: what the parked index and its order are made of."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.chains import NO_CHAIN, Chains
from pie_vllm.policy.pool.key_table import KeyTable


class Crowded(int):
    """A key whose hash is one of three, so that searches run into each other."""

    def __hash__(self) -> int:
        return int(self) % 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=80), st.booleans())
def test_it_finds_what_a_dict_finds(steps: list[tuple[int, bool]], crowded: bool) -> None:
    """After any sequence of additions and removals, with hashes that collide too."""
    keys = [Crowded(n) if crowded else n * 1000 for n in range(12)]
    table = KeyTable(12, [None] * 12)
    model: dict[int, int] = {}
    free = list(range(12))
    for which, add in steps:
        key = keys[which]
        if add and key not in model:
            model[key] = free.pop(which % len(free))
            table.add(key, model[key])
        elif not add and key in model:
            free.append(model[key])
            table.remove(model.pop(key))
        table.check_integrity()
        assert len(table) == len(model)
        assert [table.find(k) for k in keys] == [model.get(k, -1) for k in keys]


def test_age_does_not_lengthen_searches() -> None:
    """Removals leave no marks: after much coming and going an empty table is empty."""
    table = KeyTable(50, array("q", bytes(8 * 50)))
    rng = random.Random(1)
    for _ in range(100):
        keys = rng.sample(range(10**9), 50)
        for number, key in enumerate(keys):
            table.add(key, number)
        for number in rng.sample(range(50), 50):
            table.remove(number)
    assert set(table._slots) == {-1}


def test_a_broken_table_is_noticed() -> None:
    """The check can fail."""
    table = KeyTable(4, [None] * 4)
    table.add(5, 0)  # A number, whose hash is the same in each run.
    table.keys[0] = 6
    with pytest.raises(IntegrityError):
        table.check_integrity()


def test_random_moves_keep_the_lists() -> None:
    """Each list keeps the order in which its numbers came."""
    rng = random.Random(2)
    chains = Chains(9, 3)
    model: list[list[int]] = [[], [], []]
    for _ in range(3000):
        number = rng.randrange(9)
        chain = next((c for c in range(3) if number in model[c]), NO_CHAIN)
        assert chains.chain[number] == chain
        if chain == NO_CHAIN:
            chain = rng.randrange(3)
            chains.append(chain, number)
            model[chain].append(number)
        else:
            assert chains.remove(number) == chain
            model[chain].remove(number)
        assert [list(chains.walk(c)) for c in range(3)] == model
        assert [chains.oldest(c) for c in range(3)] == [m[0] if m else -1 for m in model]
        chains.check_integrity()


def test_a_broken_list_is_noticed() -> None:
    """A link back, a length and a mark are all looked at."""
    for spoil in ("_before", "length", "chain"):
        chains = Chains(4, 1)
        for number in range(3):
            chains.append(0, number)
        chains.check_integrity()
        getattr(chains, spoil)[0] = 2
        with pytest.raises(IntegrityError):
            chains.check_integrity()
    chains = Chains(4, 1)
    chains.chain[2] = 0
    with pytest.raises(IntegrityError, match="in no list"):
        chains.check_integrity()

"""What a waiting request finds parked."""

from __future__ import annotations

from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.policy.admission.lookup import (
    ParkedHits,
    ParkedLookup,
    Room,
    without_last_block,
)
from pie_vllm.policy.admission.restore import ParkedKey
from tests.helpers.fakes import FakePool
from tests.helpers.parked_steps import leave

ROOM = Room(4, 2, 2)


def begin(pool: FakePool, name: str, count: int) -> list[Any]:
    """A request is admitted and takes blocks; the step goes on."""
    pool.tables[name] = []
    pool.residency.admit(name)
    assert pool.allocate(name, count)
    pool.residency.admitted(name)
    return pool.tables[name]


def end(pool: FakePool, name: str, count: int) -> None:
    """The step in which a request computes so many blocks is planned."""
    pool.residency.computed_again(name, count)
    pool.residency.end_step({name: 1}, {name}, True, None)


def test_kv_on_its_way_to_the_pool_is_waited_for() -> None:
    """A step cannot copy back what it stores; the next one can: it is not worth computing again."""
    pool = FakePool(Geometry(2, 4096, 8, 2, 1, 8, 8, 4096), "lru")
    leave(pool, "a", *"xyz")
    lookup = ParkedLookup(pool.residency, pool.find, 16)
    hits = [pool.cached["x"], pool.cached["y"]]
    begin(pool, "b", 5)
    assert "z" not in pool.cached, "the request took its page"
    now = lookup.find("c", 49, ["z"], hits, ROOM)
    assert now is not None
    assert now.cut
    assert (now.parked, now.tokens) == (0, 32)
    end(pool, "b", 5)
    then = lookup.find("c", 49, ["z"], hits, ROOM)
    assert then is not None
    assert not then.cut
    assert (then.found, then.tokens) == ([ParkedKey("z")], 48)


def test_the_last_block_of_a_hit_is_computed_again() -> None:
    """It is the last one of cached and parked blocks together."""
    a, b, c = "abc"  # Cached blocks.
    x, y = ParkedKey("x"), ParkedKey("y")
    assert without_last_block([a, b], None, 16) == ([a], None)
    assert without_last_block([], None, 16) == ([], None)
    two = ParkedHits([x, y], 2, 2, 64, 64, False)
    assert without_last_block([a, b], two, 16) == ([a, b], ParkedHits([x], 1, 1, 48, 48, False))
    mixed = ParkedHits([x, c], 1, 1, 64, 64, False)
    assert without_last_block([a, b], mixed, 16) == ([a, b], ParkedHits([x], 1, 1, 48, 48, False))
    pooled = ParkedHits([x, y], 2, 1, 64, 64, True)
    assert without_last_block([a, b], pooled, 16)[1] == ParkedHits([x], 1, 1, 48, 48, True)
    one = ParkedHits([x], 1, 1, 48, 48, False)
    assert without_last_block([a, b], one, 16) == ([a, b], None)
    coming = ParkedHits([], 0, 0, 32, 32, True)
    assert without_last_block([a, b], coming, 16) == ([a], ParkedHits([], 0, 0, 16, 16, True))


def test_nothing_is_computed_again_ahead_of_a_requests_own_tail() -> None:
    """The block behind the last one is known."""
    own = ParkedHits([ParkedKey("x")], 1, 1, 32, 40, False)
    assert without_last_block(["a"], own, 16) == (["a"], own)


def test_kv_that_is_nowhere_is_not_waited_for() -> None:
    """Nor does a request wait for what nobody has parked."""
    pool = FakePool(Geometry(2, 4096, 8, 2, 1, 8, 8, 4096), "lru")
    lookup = ParkedLookup(pool.residency, pool.find, 16)
    assert lookup.find("c", 49, ["x", "y", "z"], [], ROOM) is None


def test_a_look_that_led_to_nothing_is_nobody_elses() -> None:
    """vLLM looks a request up, then finds no room for its image, and looks at another one first.

    It has one object for all that hit nothing.
    """
    pool = FakePool(Geometry(2, 4096, 8, 2, 1, 8, 8, 4096), "lru")
    leave(pool, "a", *"xyz")
    begin(pool, "b", 7)
    end(pool, "b", 7)
    lookup, nothing = ParkedLookup(pool.residency, pool.find, 16), ()
    own = lookup.find("c", 49, ["x", "y", "z"], nothing, ROOM)
    assert own is not None
    assert own.found == [*map(ParkedKey, "xyz")]
    assert lookup.find("d", 20, ["w"], nothing, ROOM) is None
    again = lookup.find("c", 49, ["x", "y", "z"], nothing, ROOM)
    assert again is not None
    assert again.found == own.found
    pool.residency.parking.clear()
    assert lookup.find("c", 49, ["x", "y", "z"], nothing, ROOM) is None

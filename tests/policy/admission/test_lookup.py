"""What a waiting request finds parked."""

from __future__ import annotations

from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.policy.admission.lookup import ParkedLookup, Room
from pie_vllm.policy.admission.restore import ParkedKey
from tests.helpers.fakes import FakePool

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
    for key, block in zip("xyz", begin(pool, "a", 3), strict=True):
        block.block_hash = key
        pool.cached[key] = block
    end(pool, "a", 3)
    pool.free("a")
    lookup = ParkedLookup(pool.residency, pool.cached.get, 16)
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


def test_kv_that_is_nowhere_is_not_waited_for() -> None:
    """Nor does a request wait for what nobody has parked."""
    pool = FakePool(Geometry(2, 4096, 8, 2, 1, 8, 8, 4096), "lru")
    lookup = ParkedLookup(pool.residency, pool.cached.get, 16)
    assert lookup.find("c", 49, ["x", "y", "z"], [], ROOM) is None

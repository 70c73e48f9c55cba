"""Full blocks of preempted requests, kept under the names of these."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.admission.request_keys import RequestKey
from pie_vllm.policy.admission.transaction import Admission
from tests.helpers.fakes import FakePool
from tests.helpers.parked_steps import make, take

SIZE = 16


def made(**sizes: int) -> tuple[FakePool, Admission]:
    """Blocks without keys of their contents."""
    pool = make(**sizes)
    return pool, Admission(pool.residency, pool.find, SIZE, by_request=True)


def preempted(
    pool: FakePool, admission: Admission, name: str, blocks: int, tokens: int
) -> list[Any]:
    """A request that has computed so many tokens loses its blocks; returns them."""
    take(pool, name, blocks)
    table = [*pool.tables[name]]
    pool.residency.computed(name, tokens // SIZE)
    admission.releases(name, tokens, finished=False)
    pool.free(name)
    return table


def keys(admission: Admission, name: str, first: int = 0, end: int = 100) -> list[RequestKey]:
    """Keys that a request asks for."""
    return [*admission.request_keys(name, first, end)]


def test_full_blocks_are_found_by_their_request() -> None:
    """In order, as many as are asked for; the last one is its tail."""
    pool, admission = made()
    table = preempted(pool, admission, "a", 3, 2 * SIZE + 5)
    found = keys(admission, "a")
    assert found == [RequestKey("a", 0), RequestKey("a", 1)]
    assert pool.find(found) == table[:2]
    assert keys(admission, "a", end=1) == found[:1]
    assert keys(admission, "a", first=1) == found[1:]
    assert keys(admission, "b") == []
    tail = pool.residency.parking.tails._tails["a"]
    assert (tail.index, tail.tokens) == (2, 2 * SIZE + 5)


def test_blocks_whose_page_gets_another_use_are_parked() -> None:
    """And those of a request that has ended are not: their pages are used first."""
    pool, admission = made()
    parking = pool.residency.parking
    preempted(pool, admission, "a", 2, 2 * SIZE)
    other = preempted(pool, admission, "b", 2, 2 * SIZE)
    admission.releases("b", 0, finished=True)
    assert keys(admission, "b") == []
    assert pool.find([RequestKey("b", 0), RequestKey("b", 1)]) == [None, None]
    free = [block.block_id for block in pool.residency.queue.next_reused(2)]
    assert sorted(free) == sorted(block.block_id for block in other)
    take(pool, "c", pool.residency.queue.free_residents)
    assert [parking.parked(key) for key in keys(admission, "a")] == [True, True]
    pool.residency.check_integrity()


def test_rows_of_a_request_that_has_ended_are_free() -> None:
    """Those of its blocks, and that of its tail."""
    pool, admission = made()
    rows = pool.residency.rows
    preempted(pool, admission, "a", 3, 2 * SIZE + 5)
    take(pool, "c", pool.residency.queue.free_residents)
    pool.residency.end_step({}, set(), True, None)
    assert rows.num_parked == 3
    admission.releases("a", 0, finished=True)
    assert rows.num_parked == 0
    pool.residency.check_integrity()


@pytest.mark.parametrize("why", ["finished", "old weights"])
def test_a_request_takes_its_keys_with_it(why: str) -> None:
    """A block in use that was kept before is free without a key when it is given back."""
    pool, admission = made()
    preempted(pool, admission, "a", 2, 2 * SIZE)
    blocks = pool.find(keys(admission, "a"))
    pool.tables["a"] = []
    pool.residency.admit("a", 2)
    pool.hit("a", blocks)
    admission.releases("a", 2 * SIZE, finished=why == "finished", reusable=False)
    pool.free("a")
    assert keys(admission, "a") == []
    assert not pool.cached
    assert all(block.block_hash is None for block in blocks)
    pool.residency.check_integrity()


def test_blocks_with_keys_of_their_contents_have_none_of_a_request() -> None:
    """A caller that mixes up both is told."""
    pool = make()
    admission = Admission(pool.residency, pool.find, SIZE)
    with pytest.raises(IntegrityError, match="not kept by its name"):
        admission.request_keys("a", 0, 1)

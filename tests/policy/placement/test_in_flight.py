"""Steps in flight: what a failed one spoilt is followed through tables, rows and prefix cache."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.geometry import Geometry
from pie_vllm.plan import StepPlan
from pie_vllm.policy.placement.in_flight import Flight
from pie_vllm.policy.placement.interfaces import GroupBeside
from tests.helpers.fakes import FakePool

BLOCK = 4
RESIDENT = 8


class Bench:
    """Two requests of four blocks each over seven residents; the first block of "old" is pooled.

    Attributes:
        states: tables of another group of layers.
    """

    def __init__(self) -> None:
        self.states: dict[str, list[Any]] = {}
        beside = GroupBeside(1, self.states, lambda tokens: range(tokens // BLOCK))
        self.pool = FakePool(Geometry(2, 4096, RESIDENT, 8, 1, 8, 3, 4096), beside=[beside])
        self.residency = self.pool.residency
        self.flight = Flight(self.residency, BLOCK)
        for name in ("old", "new"):
            self.pool.tables[name] = []
            self.residency.admit(name)
            assert self.pool.allocate(name, 4)
            self.residency.admitted(name)
            self.residency.computed_again(name, 3)
        assert self.pool.tables["old"][0].block_id >= RESIDENT

    def submit(self, **starts: int) -> tuple[object, StepPlan | None]:
        """Plan a step of requests that begin to compute at these positions, and send it."""
        token = object()
        plan = self.residency.end_step(starts, (), True, None)
        self.flight.submitted(token, plan, lambda: starts)
        return token, plan

    def share(self, name: str, blocks: list[Any]) -> None:
        """A request hits these blocks of another one."""
        self.pool.tables[name] = []
        self.residency.admit(name, len(blocks))
        self.pool.hit(name, blocks)
        self.residency.admitted(name)


def test_a_failed_store_spoils_the_pooled_block_from_its_first_token() -> None:
    """Its row holds unknown bytes, and whoever has the block has nothing from there on."""
    bench = Bench()
    token, plan = bench.submit(old=12, new=12)
    assert plan is not None
    assert len(plan.stores)
    assert bench.flight.failed(token) == {"old": 0}


def test_a_failed_load_spoils_what_its_readers_computed_in_the_step() -> None:
    """The row is right, and so is what was computed before; who reads no pooled block is well."""
    bench = Bench()
    first, _ = bench.submit(old=12, new=12)
    second, plan = bench.submit(old=13, new=13)
    assert plan is not None
    assert not len(plan.stores)
    bench.flight.landed(first)
    assert bench.flight.failed(second) == {"old": 13}


def test_steps_behind_a_failed_one_are_followed_from_where_they_began() -> None:
    """Their tokens stand on wrong ones, so the first position counts."""
    bench = Bench()
    bench.flight.landed(bench.submit(old=12, new=12)[0])
    failed, _ = bench.submit(old=13, new=13)
    bench.submit(old=14, new=14)
    assert bench.flight.failed(failed) == {"old": 13}


def test_a_step_that_landed_fails_no_more() -> None:
    """Its copies are known to be right."""
    bench = Bench()
    token, _ = bench.submit(old=12, new=12)
    bench.flight.landed(token)
    assert bench.flight.failed(token) == {}


def test_what_others_found_of_it_in_the_prefix_cache_is_spoilt_too() -> None:
    """The key is forgotten, and a request that hit it keeps what stands before it."""
    bench = Bench()
    bench.flight.landed(bench.submit(old=12, new=12)[0])
    token, _ = bench.submit(old=12, new=12)
    table = bench.pool.tables["old"]
    table[3].block_hash = "filled in the failed step"
    bench.pool.cached[table[3].block_hash] = table[3]
    bench.share("guest", list(table))
    assert bench.flight.failed(token) == {"old": 12, "guest": 12}
    assert not bench.pool.cached


def test_a_request_that_left_meanwhile_is_named_as_long_as_its_steps_are_in_flight() -> None:
    """It may come again, and others may have found its blocks."""
    for lands in (False, True):
        bench = Bench()
        bench.flight.landed(bench.submit(old=12, new=12)[0])
        token, _ = bench.submit(old=13, new=13)
        bench.pool.free("old")
        later, _ = bench.submit(new=14)
        if lands:
            bench.flight.landed(token)
            assert bench.flight.failed(later) == {}
        else:
            assert bench.flight.failed(token) == {"old": 13}


@pytest.mark.parametrize("left", [False, True])
def test_a_state_upon_wrong_kv_is_not_found_any_more(left: bool) -> None:
    """It has a key of its own, by which others find it once the other blocks are computed anew."""
    bench = Bench()
    bench.flight.landed(bench.submit(old=12, new=12)[0])
    token, _ = bench.submit(old=13, new=13)
    wrong, right = bench.pool.blocks[-2:]
    for block, key, name in ((wrong, "state of old", "old"), (right, "state of new", "new")):
        block.block_hash = key
        bench.pool.cached[key] = block
        bench.states[name] = [bench.pool.blocks[0], block]
    if left:
        bench.pool.free("old")
        del bench.states["old"]
    assert bench.flight.failed(token) == {"old": 13}
    assert [*bench.pool.cached] == ["state of new"]


def test_what_left_and_was_given_out_again_is_not_touched() -> None:
    """The block has another key by then."""
    bench = Bench()
    bench.flight.landed(bench.submit(old=12, new=12)[0])
    token, _ = bench.submit(old=13, new=13)
    block = bench.pool.blocks[-1]
    block.block_hash = "state of old"
    bench.states["old"] = [block]
    bench.pool.free("old")
    del bench.states["old"]
    block.block_hash = "of somebody else"
    bench.pool.cached[block.block_hash] = block
    assert bench.flight.failed(token) == {"old": 13}
    assert [*bench.pool.cached] == ["of somebody else"]


def test_nothing_is_known_of_steps_that_were_cleared() -> None:
    """No result of theirs will come."""
    bench = Bench()
    token, _ = bench.submit(old=12, new=12)
    bench.flight.clear()
    assert bench.flight.failed(token) == {}

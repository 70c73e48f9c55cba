"""What is remembered of a look-up is what a look from the first block on would find."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest

from pie_vllm.policy.admission.lookup import NO_LIMITS, Limits, ParkedHits, ParkedLookup, Room
from pie_vllm.policy.admission.restore import ParkedKey, restore_part
from pie_vllm.policy.pool.parked_kv import Parking
from tests.helpers.fakes import FakePool
from tests.helpers.naive_parked import evict
from tests.helpers.parked_steps import leave, make, take

KEYS = "abcdefghijkl"
SIZE = 16
TOKENS = len(KEYS) * SIZE + 1


class Waiting:
    """A request that is looked up again and again, over a prefix cache that counts its readers."""

    def __init__(self, pool: FakePool) -> None:
        self.pool = pool
        self.read = 0
        self.lookup = ParkedLookup(pool.residency, self._cached, SIZE)

    def _cached(self, keys: Sequence[Any]) -> list[Any]:
        self.read += len(keys)
        return self.pool.find(keys)

    def look(self, limits: Limits = NO_LIMITS) -> tuple[list[Any], ParkedHits | None]:
        """A look in a step in which the request is refused."""
        hits: Any = self.lookup.recall("w", 0)
        if hits is None:
            hits = [*takewhile(lambda b: b is not None, map(self.pool.cached.get, KEYS))]
        rest = iter(KEYS[len(hits) :])
        queue = self.pool.residency.queue
        room = Room(queue.free_residents, queue.available_pooled, 1)
        found = self.lookup.find("w", TOKENS, rest, hits, room, state=0, limits=limits)
        self.lookup.keep("w")
        return list(hits), found

    def anew(self) -> list[Any]:
        """What there is, looked at from the first block on."""
        found: list[Any] = []
        for key in KEYS:
            block = self.pool.cached.get(key)
            if block is None and not self.pool.residency.parking.has(key):
                break
            found.append(block or ParkedKey(key))
        return found


class Traffic:
    """What others do meanwhile, at random."""

    def __init__(self, pool: FakePool, waiting: Waiting, rng: random.Random) -> None:
        self.pool, self.waiting, self.rng = pool, waiting, rng
        self.serial = 0
        self.running: list[str] = []

    def name(self) -> str:
        self.serial += 1
        return f"r{self.serial}"

    def takes(self) -> None:
        count = self.rng.randint(1, 4)
        if count <= self.pool.residency.queue.num_free_blocks:
            name = self.name()
            take(self.pool, name, count)
            self.pool.residency.computed(name, self.rng.choice((0, count)))
            self.running.append(name)

    def ends(self) -> None:
        if self.running:
            self.pool.free(self.running.pop(self.rng.randrange(len(self.running))))

    def computes_the_same(self) -> None:
        new = [key for key in KEYS if key not in self.pool.cached][: self.rng.randint(1, 3)]
        if new and len(new) <= self.pool.residency.queue.num_free_blocks:
            leave(self.pool, self.name(), *new)

    def hits(self) -> None:
        cached = takewhile(lambda b: b is not None, map(self.pool.cached.get, KEYS))
        blocks, name = list(cached)[: self.rng.randint(1, 6)], self.name()
        if blocks:
            self.pool.tables[name] = []
            self.pool.residency.admit(name, len(blocks))
            self.pool.hit(name, blocks)
            self.pool.residency.admitted(name)
            self.pool.residency.end_step({name: 1}, {name}, True, None)
            self.running.append(name)

    def demotes(self) -> None:
        self.pool.residency.make_residents_free(self.rng.randint(1, 3))

    def loses(self) -> None:
        if self.pool.cached:
            key = self.rng.choice(sorted(self.pool.cached))
            self.pool.residency.discard(self.pool.cached[key])

    def forgets(self) -> None:
        if self.rng.random() < 0.1:
            self.pool.residency.forget_idle()

    def restores(self) -> None:
        """A part of what the request found comes back, as for one that waits."""
        hits, found = self.waiting.look()
        most = self.rng.randint(1, 4)
        if found and found.residents >= most and self.waiting.lookup.still_parked(most):
            blocks = restore_part(self.pool.residency, found.found, len(hits), most)
            self.waiting.lookup.restored(blocks)

    def step(self) -> None:
        calls = (
            *(self.takes,) * 4,
            *(self.ends,) * 4,
            *(self.restores,) * 3,
            *(self.hits, self.demotes, self.computes_the_same, self.loses, self.forgets),
        )
        self.rng.choice(calls)()
        if self.rng.random() < 0.8:
            self.pool.residency.end_step({}, (), True, None)


@pytest.mark.parametrize("seed", range(60))
def test_a_remembered_look_finds_what_a_new_one_finds(seed: int) -> None:
    """Blocks, their order, and how many nobody uses; and none of them is reused before it says."""
    rng = random.Random(seed)
    pool = make(resident=rng.choice((16, 24)), pooled=rng.choice((2, 6)), rows=rng.choice((8, 20)))
    leave(pool, "first", *KEYS)
    waiting = Waiting(pool)
    traffic = Traffic(pool, waiting, rng)
    for _ in range(120):
        traffic.step()
        waiting.look()
        while not waiting.lookup.still_parked(len(KEYS)):
            waiting.look()
        cursor = waiting.lookup._cursor
        assert cursor is not None
        hits, behind = cursor.hits, cursor.behind
        assert [*hits, *behind] == waiting.anew()
        assert not any(isinstance(block, ParkedKey) for block in hits)
        blocks = [b for b in (*hits, *behind) if not isinstance(b, ParkedKey) and not b.ref_cnt]
        assert cursor.idle == len(blocks)
        assert cursor.idle_hits == sum(not block.ref_cnt for block in hits)
        ahead = max(cursor._safe - pool.residency.queue.taken, 0)
        assert not {*pool.residency.queue.next_reused(ahead)} & {*blocks}
        pool.residency.check_integrity()


def parked_chat(resident: int = 24) -> FakePool:
    """All of the chat is parked and nothing of it cached."""
    pool = make(resident=resident, pooled=2, rows=20)
    leave(pool, "first", *KEYS)
    take(pool, "other", resident - 1)
    pool.free("other")
    return pool


def test_a_look_that_finds_what_the_last_one_found_reads_one_key() -> None:
    """That of the gap, however much was found before it."""
    waiting = Waiting(parked_chat())
    waiting.pool.residency.parking.forget(["h"])
    _, found = waiting.look()
    assert found is not None
    assert found.parked == KEYS.index("h")
    waiting.read = 0
    assert waiting.look()[1] == found
    assert waiting.read <= 1


def test_a_look_goes_on_where_the_last_one_ended() -> None:
    """Five keys a step; what has come back meanwhile is among the hits."""
    waiting = Waiting(parked_chat())
    _, found = waiting.look(Limits(keys=5))
    assert found is not None
    assert (found.parked, found.more, waiting.read) == (5, True, 5)
    waiting.lookup.restored(restore_part(waiting.pool.residency, found.found, 0, 2))
    waiting.read = 0
    hits, found = waiting.look(Limits(keys=5))
    assert found is not None
    assert (len(hits), found.parked, found.more, waiting.read) == (2, 8, True, 5)
    hits, found = waiting.look(Limits(keys=5))
    assert found is not None
    assert (len(hits), found.parked, found.more) == (2, 10, False)
    assert found.tokens == len(KEYS) * SIZE


def test_other_tokens_are_looked_up_anew() -> None:
    """A request whose keys are others, as after a reload of its adapter, remembers nothing."""
    waiting = Waiting(parked_chat())
    waiting.look()
    assert waiting.lookup.recall("w", 1) is None
    assert waiting.lookup.recall("v", 0) is None
    assert waiting.lookup.recall("w", 0) is not None
    waiting.lookup.forget("w")
    assert waiting.lookup.recall("w", 0) is None


def test_what_waits_to_come_back_is_young_when_it_was_found() -> None:
    """KV that is parked later goes before it, and of a prefix the last block goes first."""
    pool = parked_chat()
    Waiting(pool).look()
    parking: Parking = pool.residency.parking
    gone = [evict(parking._index) for _ in range(len(KEYS))]
    assert [entry[0] for entry in gone if entry] == [*reversed(KEYS)]

"""Completed blocks: a look finds every complete block, and few requests are asked for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from pie_vllm.geometry import Geometry
from pie_vllm.policy.placement.completed_blocks import CompletedBlocks
from pie_vllm.policy.speculation import DraftsInFlight
from tests.helpers.fakes import FakePool


class Request:
    """A request's progress; counts how often it is looked at."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.asked = 0

    @property
    def num_computed_tokens(self) -> int:
        self.asked += 1
        return self.tokens


class Bench:
    """Requests that grow over residents without end."""

    def __init__(self, block_size: int) -> None:
        self.size = block_size
        self.pool = FakePool(Geometry(1, 8, 3000, 1, 1, 1, 1, 1))
        self.residency = self.pool.residency
        self.completions = CompletedBlocks(block_size, self.residency)
        self.requests: dict[str, Request] = {}
        self.fresh: list[str] = []

    def add(self, name: str, tokens: int) -> None:
        self.requests[name] = Request(tokens)
        self.pool.tables[name] = []
        self.residency.admit(name)
        self._allocate(name)
        self.fresh.append(name)

    def remove(self, name: str) -> None:
        self.pool.free(name)
        del self.requests[name]
        self.fresh = [other for other in self.fresh if other != name]

    def step(self, tokens: dict[str, int], *, look: bool = True) -> None:
        """Compute tokens of some requests, then check what is known of each."""
        for name, count in tokens.items():
            self.requests[name].tokens += count
            self._allocate(name)
        several = [name for name, count in tokens.items() if count > 1]
        self.completions.next_step(self.requests, several, self.fresh)
        self.fresh = []
        if look:
            self.residency.catch_up()
        for name, request in self.requests.items():
            known, full = self.residency.victims.holders[name].full, request.tokens // self.size
            assert known == full if look or name in several else known <= full, name
        self.residency.check_integrity()

    def _allocate(self, name: str) -> None:
        have, want = len(self.pool.tables[name]), -(-self.requests[name].tokens // self.size)
        assert self.pool.allocate(name, want - have)


def names() -> Iterator[str]:
    number = 0
    while True:
        yield f"r{number % 40}"
        number += 1


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("left_out", [0.0, 0.4, 0.97])
@pytest.mark.parametrize("looks", [1.0, 0.1])
def test_a_look_finds_every_complete_block(block_size: int, left_out: float, looks: float) -> None:
    """Whatever comes, is left out, works on a prompt, goes, or comes again by the same name."""
    rng = random.Random(block_size)
    bench, fresh_name = Bench(block_size), names()
    for _ in range(300):
        for name in list(bench.requests):
            if rng.random() < 0.02:
                bench.remove(name)
        tokens = {
            name: rng.randint(2, 40) if rng.random() < 0.02 else 1
            for name in bench.requests
            if rng.random() >= left_out
        }
        if rng.random() < 0.2:
            name = next(fresh_name)
            if name in bench.requests:
                bench.remove(name)
                tokens.pop(name, None)
            bench.add(name, rng.randint(1, 50))
        bench.step(tokens, look=rng.random() < looks)


@pytest.mark.parametrize(("every", "asked"), [(1, 2), (32, 1), (100, 0)])
def test_a_request_that_decodes_is_asked_once_a_block(every: int, asked: int) -> None:
    """A look asks those that completed blocks since the last one; a step without one asks nobody.

    Args:
        every: steps between two looks, of 32 steps.
        asked: how often each request is, which completes two blocks in them.
    """
    bench = Bench(16)
    for number in range(64):
        bench.add(f"r{number}", 1 + number % 16)
    bench.step({})
    before = sum(request.asked for request in bench.requests.values())
    for step in range(1, 33):
        bench.step(dict.fromkeys(bench.requests, 1), look=step % every == 0)
    assert sum(request.asked for request in bench.requests.values()) - before == 64 * asked


def test_demotion_looks_first() -> None:
    """The newest complete block of the request admitted last goes, not an older request's."""
    bench = Bench(4)
    bench.add("old", 8)
    bench.add("new", 3)
    bench.step({})
    bench.step({"old": 1, "new": 1}, look=False)
    newest = bench.pool.tables["new"][0].block_id
    bench.residency.make_residents_free(1)
    assert bench.pool.tables["new"][0].block_id != newest


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("drafts_max", [1, 3, 7])
def test_draft_tokens_count_once_they_are_accepted(in_flight: int, drafts_max: int) -> None:
    """A look finds every certain block, and none whose tokens may be written again."""
    rng = random.Random(drafts_max)
    bench, drafts = Bench(4), DraftsInFlight()
    bench.completions = CompletedBlocks(4, bench.residency, drafts, 1 + drafts_max)
    bench.add("r", 6)
    bench.completions.next_step(bench.requests, (), bench.fresh)
    request, holder = bench.requests["r"], bench.residency.victims.holders["r"]
    flight: list[tuple[object, int]] = []
    missed = 0
    for _ in range(300):
        count = rng.randint(0, drafts_max)
        step = object()
        request.tokens += 1 + count
        bench._allocate("r")
        drafts.submitted(step, {"r": [0] * count} if count else {})
        flight.append((step, count))
        bench.completions.pass_step()
        while len(flight) >= in_flight:
            step, count = flight.pop(0)
            request.tokens -= rng.randint(0, count)
            drafts.landed(step)
        certain = request.tokens - sum(count for _, count in flight)
        bench.residency.catch_up()
        assert holder.full == certain // 4
        missed += request.tokens // 4 > holder.full
        assert drafts.uncertain("r") == sum(count for _, count in flight)
    assert missed > 20 or in_flight == 1, "no block depended on a draft"

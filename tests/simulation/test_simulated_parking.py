"""Parking in simulation: what is computed again, what restores cost, and whether they pay."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.simulated.returning import always, returning_case
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior
from pie_vllm.policy.control.decider import Decider, Decides, Decision
from pie_vllm.policy.control.detector import Observation
from pie_vllm.simulation.simulator import Simulation, run_stock
from pie_vllm.simulation.traces import Job, Outcome, Profile, Static

SIZES = Geometry(8, 65536, 41, 8, 2, 120, 8, 4096)
"""40 resident blocks beside the null block, 8 pooled, and rows for all that is ever cached."""

MACHINE = Profile(1e10, 0.01, 0.0, 1e-4, 0.0, 1 / 8, store_link=1e10)

RETURNING = [Job(0.0, 64, 17), Job(1.0, 608, 1), Job(3.0, 16, 1, after=0)]
"""A chat of 5 full blocks, a prompt of 38 that takes the place of 3, in one step,
and the chat comes back."""
PROMPTS = 64 + 608 + 17
"""Tokens to compute, if all full blocks of the chat are had."""


def play(
    jobs: list[Job],
    profile: Profile = MACHINE,
    sizes: Geometry = SIZES,
    decider: Decides | None = None,
    parking: str | None = "lru",
    *,
    caching: bool = True,
) -> Outcome:
    """Play a trace, with a prefix cache or without; its books are checked in each step."""

    def check() -> float:
        simulation.residency.check_integrity()
        return 1.0

    decider = decider or Static(sizes.pooled_blocks)
    simulation = Simulation(
        sizes, profile, jobs, decider, scatter=check, caching=caching, parking=parking
    )
    outcome = simulation.run()
    assert simulation.residency.pooled_in_use == 0
    assert not simulation.residency.parking.tails
    assert outcome.tokens == sum(job.answer for job in jobs)
    return outcome


def test_a_chat_that_comes_back_computes_what_is_new() -> None:
    """Of 64 + 17 + 16 tokens, 5 full blocks are had, of which three were parked.

    These get pages again, and 17 tokens new ones, for which five blocks of the prompt are parked.
    """
    outcome = play(RETURNING)
    assert outcome.prompt_tokens == PROMPTS
    assert (outcome.parked, outcome.restored, outcome.lost) == (3 + 5, 3, 0)
    assert [load for load in outcome.loads if load] == [3]


def test_without_parking_it_computes_what_lost_its_place() -> None:
    """Two of its blocks are cached still; stock with as much finds the same."""
    outcome = play(RETURNING, parking=None)
    assert outcome.prompt_tokens == PROMPTS + 3 * 16
    assert (outcome.parked, outcome.restored, sum(outcome.loads)) == (0, 0, 0)
    stock = run_stock(SIZES.resident_blocks, MACHINE, RETURNING, caching=True)
    assert stock == outcome._replace(decisions=stock.decisions)


def test_without_a_prefix_cache_a_chat_finds_nothing() -> None:
    """And nothing of it is parked."""
    outcome = play(RETURNING, caching=False)
    assert outcome.prompt_tokens == PROMPTS + 5 * 16
    assert outcome.parked == 0


def test_a_restore_is_waited_for_as_far_as_compute_does_not_hide_it() -> None:
    """Three blocks behind a step of 17 tokens; the first layer's part in any case."""
    for link, stalls in ((1e8, True), (1e10, False)):
        times = play(RETURNING, replace(MACHINE, link=link, store_link=None)).times
        compute = MACHINE.step_seconds(1, 16, 0)
        load = 3 * SIZES.row_bytes / link
        assert (load > compute) == stalls
        assert times[-1].compute == pytest.approx(compute)
        assert times[-1].stall == pytest.approx(max(load - compute, load / 8))
        assert sum(time.stall for time in times) == times[-1].stall


def test_stores_are_waited_for_in_the_other_direction() -> None:
    """Three blocks in the step that takes their place, and later five; restores cost nothing."""
    times = play(RETURNING, replace(MACHINE, link=1e15, store_link=1e7)).times
    stored = [3 * SIZES.row_bytes / 1e7, 5 * SIZES.row_bytes / 1e7]
    beside = [MACHINE.step_seconds(1, count - 1, 0) for count in (608, 17)]
    waited = [time.stall for time in times if time.stall > 1e-6]
    assert waited == pytest.approx([s - c for s, c in zip(stored, beside, strict=True)])


class Noting(Static):
    """Lets a step store so many blocks for parking, and notes what it shows."""

    def __init__(self, parks: int | None = None) -> None:
        super().__init__(SIZES.pooled_blocks)
        self._decision = self._decision._replace(park_blocks_max=parks)
        self.seen: list[Observation] = []

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:  # noqa: ARG002
        self.seen.append(seen)


def test_the_decider_is_told_of_restores() -> None:
    """Bytes that come for a request that just came are not those of pooling."""
    decider = Noting()
    play(RETURNING, decider=decider)
    *before, last = decider.seen
    assert (last.restored, last.bytes_loaded) == (True, 3 * SIZES.row_bytes)
    assert not any(seen.restored or seen.bytes_loaded for seen in before)


def test_a_step_parks_no_more_than_the_decider_allows() -> None:
    """One of three blocks, and later one of five: of a chat it is the last, which nobody finds."""
    outcome = play(RETURNING, decider=Noting(parks=1))
    assert (outcome.parked, outcome.lost, outcome.restored) == (2, 6, 0)


@pytest.mark.parametrize(("times", "restores"), [(0.8, False), (1.25, True)])
def test_a_decider_restores_what_the_link_brings_sooner(times: float, restores: bool) -> None:
    """Than its tokens are computed; the prompts before say how long these take."""
    link = times * SIZES.row_bytes / (16 * MACHINE.per_prompt_token)
    prior = Prior(link, step_seconds=MACHINE.base)
    decider = Decider(SIZES.row_bytes, SIZES.pooled_blocks, prior=prior, block_tokens=16)
    machine = replace(MACHINE, link=link, store_link=None)
    outcome = play(RETURNING, machine, decider=decider)
    assert outcome.restored == (3 if restores else 0)
    assert outcome.prompt_tokens == PROMPTS + (0 if restores else 3 * 16)


CROWD = [Job(0.001 * i, 60 + 9 * (i % 5), 120) for i in range(12)]
"""Each of up to 14 blocks."""


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_request_computes_nothing_again(caching: bool) -> None:
    """Full blocks and the last one, which is not full, come back where the pool has room."""
    outcome = play(CROWD, caching=caching)
    assert outcome.preemptions >= 5
    assert outcome.recomputed_tokens == 0
    assert outcome.prompt_tokens == sum(job.prompt for job in CROWD)
    assert outcome.lost == 0


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_request_computes_again_what_the_pool_has_no_room_for(caching: bool) -> None:
    """Negative control: without rows to spare, and without parking."""
    few = play(CROWD, sizes=replace(SIZES, rows=8), caching=caching)
    for outcome in (few, play(CROWD, parking=None, caching=caching)):
        assert outcome.preemptions >= 5
        assert outcome.recomputed_tokens > 100


@pytest.mark.parametrize("rows", [8, 40, 120])
def test_every_token_is_computed_once_or_counted_as_again(rows: int) -> None:
    """Nothing is found that was never computed, as blocks whose step did not come."""
    decider = Noting()
    outcome = play(CROWD, sizes=replace(SIZES, rows=rows), decider=decider)
    once = sum(job.prompt + job.answer - 1 for job in CROWD)
    assert sum(seen.tokens for seen in decider.seen) == once + outcome.recomputed_tokens


def test_a_tail_counts_as_restored_and_is_all_that_a_short_request_has() -> None:
    """One of two is preempted within its first block, when the other needs a 41st."""
    jobs = [Job(0.0, 640 - 8, 10), Job(0.0, 3, 12)]
    outcome = play(jobs, sizes=replace(SIZES, pooled_blocks=1, rows=120))
    assert outcome.preemptions == 1
    assert (outcome.recomputed_tokens, outcome.restored) == (0, 1)


def test_blocks_that_nobody_finds_are_used_first() -> None:
    """Two chats leave two full blocks each, and one block that is not full."""
    jobs = [Job(0.0, 33, 1), Job(1.0, 33, 1), Job(2.0, 36 * 16, 1)]
    assert play(jobs).parked == 0
    assert play([*jobs, Job(2.0, 16, 1)]).parked == 1


def test_two_turns_run_at_once_where_both_fit_because_they_share() -> None:
    """Of 40 blocks and 8 pooled ones, each turn asks for 31, of which 30 are the same."""
    jobs = [Job(0.0, 479, 2), Job(1.0, 10, 8, after=0), Job(1.0, 10, 8, after=0)]
    outcome = play(jobs, parking=None)
    assert outcome.first_tokens[1] == outcome.first_tokens[2]


@pytest.mark.parametrize("seed", [2, 5, 14])
def test_random_traces_compute_nothing_again_either(seed: int) -> None:
    """Whatever else is evicted in the steps in which preempted requests come back."""
    case = returning_case(seed)
    outcome = case.simulation(Static(case.geometry.pooled_blocks)).run()
    assert outcome.preemptions >= 20
    assert outcome.lost == 0
    assert outcome.recomputed_tokens == 0


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_decisions_leave_the_books_right(seed: int, caching: bool) -> None:
    """Chats on few blocks, with limits and choices that change; the books are checked each step."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    for _ in range(20):
        jobs.append(Job(rng.uniform(0, 1), rng.randint(1, 150), rng.randint(1, 90)))
        for _ in range(rng.randint(0, 3)):
            after = rng.randrange(max(0, len(jobs) - 3), len(jobs))
            jobs.append(Job(rng.uniform(0, 0.5), rng.randint(1, 60), rng.randint(1, 40), after))
    sizes = replace(SIZES, rows=rng.choice((20, 60, 120)))
    outcome = play(jobs, sizes=sizes, decider=Varying(rng), parking="lru", caching=caching)
    assert outcome.preemptions > 0
    assert outcome.restored > 0 or not caching  # Few are preempted, and residents may have it.


class Varying(Static):
    """Another random decision every few steps."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(SIZES.pooled_blocks)
        self._rng = rng

    def decide(self, prompt_tokens: int = 0) -> Decision:
        rng = self._rng
        if rng.random() < 0.3:
            budget, limit, spare = (rng.randint(0, SIZES.pooled_blocks) for _ in range(3))
            parks, restores = rng.choice((None, 0, 2)), rng.random() < 0.8
            self._decision = Decision(
                budget, limit, spare, park_blocks_max=parks, restore_enabled=restores
            )
        return super().decide(prompt_tokens)


def test_turns_come_after_the_answer_and_share_what_went_before() -> None:
    """Two that continue the same chat share its blocks, not each other's."""
    jobs = [Job(0.0, 40, 9), Job(2.0, 40, 8, after=0), Job(5.0, 40, 8, after=0)]
    outcome = play(jobs)
    began = [time.began for time in outcome.times]
    ended = began[8] + outcome.times[8].compute
    assert began[9] == pytest.approx(ended + 2.0)
    assert began[9 + 8] == pytest.approx(ended + 5.0)
    # 48 of the 49 tokens have KV: 3 full blocks.
    assert outcome.prompt_tokens == 40 + 2 * (49 + 40 - 48)
    assert outcome.first_tokens == pytest.approx(
        [MACHINE.step_seconds(1, n - 1, 0) for n in (40, 41, 41)]
    )


@pytest.mark.parametrize("after", [0, 1, -1])
def test_a_turn_continues_a_job_before_it(after: int) -> None:
    """Anything else is an error."""
    with pytest.raises(ValueError, match="job 0 continues"):
        play([Job(0.0, 16, 1, after=after), Job(0.0, 16, 1)])


@pytest.mark.parametrize(("seed", "restores", "gain"), [(1, 1, 1.02), (10, 1, 1.05), (49, 0, 1.01)])
def test_restore_or_compute_is_the_better_of_both(seed: int, restores: int, gain: float) -> None:
    """On a fast link it pays to restore, on a slow one to compute; `benchmarks.regret` plays more.

    The one that is worse is the negative control.
    """
    case = returning_case(seed)

    def throughput(decider: Decides) -> float:
        return case.simulation(decider).run().throughput

    fixed = [throughput(always(case, restores=choice)) for choice in (False, True)]
    assert fixed[restores] > gain * fixed[1 - restores]
    assert throughput(case.decider()) >= 0.99 * fixed[restores]

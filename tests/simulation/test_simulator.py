"""The decider in simulation: never worse than stock, and near the best static limit."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from benchmarks.simulated import cases
from benchmarks.simulated.cases import Case, contending, limit_at, random_case, scattered
from benchmarks.simulated.shifts import GEOMETRY, Shift, shift
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.simulator import Simulation, run_stock
from pie_vllm.simulation.traces import Job, Outcome, Profile, Static, slowdown


def run(case: Case, decider: Decider | None = None) -> Outcome:
    """Play a case, and check the books at its end."""
    simulation = case.simulation(decider or case.decider())
    outcome = simulation.run()
    simulation.residency.check_integrity()
    assert simulation.residency.pooled_in_use == 0
    assert outcome.tokens == sum(job.answer for job in case.jobs)
    return outcome


def test_a_simulation_is_deterministic() -> None:
    """The same case twice is the same to the last decision."""
    assert run(random_case(5)) == run(random_case(5))


@pytest.mark.parametrize("seed", range(8))
def test_pie_is_never_worse_than_stock(seed: int) -> None:
    """At equal device bytes, less the ring's share, whatever link and load."""
    case = random_case(seed)
    pie = run(case)
    assert pie.throughput >= 0.98 * cases.stock(case, with_ring=False).throughput
    assert pie.stall_seconds <= 0.012 * pie.seconds


def test_a_fast_link_is_as_good_as_memory() -> None:
    """Where the link feeds everything, nothing is left out and capacity counts in full."""
    case = random_case(11)
    assert case.profile.link > 1e11
    pie = run(case)
    assert pie.left_out == 0
    assert pie.throughput > 1.5 * cases.stock(case, with_ring=True).throughput


def test_near_the_best_static_limit() -> None:
    """Regret against a sweep of admission limits; `benchmarks.regret` plays 200 cases."""
    regrets = []
    for seed in (3, 4, 6, 12):
        case = random_case(seed)
        best = max(run(case, limit_at(case, share)).throughput for share in (0.0, 0.1, 0.4, 1.0))
        regrets.append(1 - run(case).throughput / best)
    assert median(regrets) <= 0.02
    assert max(regrets) <= 0.10


def test_the_simulator_tells_good_limits_from_bad_ones() -> None:
    """Negative control: pooling without regard for a slow link costs most of the throughput."""
    case = random_case(4)
    window = case.geometry.pooled_blocks
    careless = Simulation(case.geometry, case.profile, case.jobs, Static(window)).run()
    assert careless.throughput < 0.3 * run(case).throughput
    assert careless.stall_seconds > 0.5 * careless.seconds


CONTENTION = {"by the byte": (0.1, 0.0), "fixed": (0.0, 0.05), "both": (0.1, 0.02)}
"""Of the link's time, by which loads slow the compute; of a step, by which any load does."""


def contended(kind: str, seed: int) -> Shift:
    """A load that doubles, on a machine whose loads slow the compute, and whose steps scatter."""
    by_time, fixed = CONTENTION[kind]
    found = shift("load doubles", seed)
    machine = contending(found.after, GEOMETRY, by_time, fixed * 0.019)
    return replace(found, before=machine, after=machine, noise=0.02)


@pytest.mark.parametrize("kind", CONTENTION)
def test_contention_is_kept_within_the_target(kind: str) -> None:
    """In the median of three traces, once it is known; and none is slower than stock."""
    found = []
    for seed in range(3):
        trace = contended(kind, seed)
        outcome = trace.play()
        found.append(slowdown(outcome.times[-1000:]))
        stock = run_stock(
            GEOMETRY.resident_blocks, trace.before, trace.jobs, scatter=scattered(trace.noise)
        )
        assert outcome.throughput >= 0.98 * stock.throughput
    assert median(found) <= 0.012


@pytest.mark.parametrize("kind", CONTENTION)
def test_uncounted_contention_slows(kind: str) -> None:
    """Negative control: with the stall alone as slowdown, steps take percents longer."""
    careless = Decider(
        GEOMETRY.row_bytes, GEOMETRY.pooled_blocks, prior=Prior(limits_contention=False)
    )
    assert slowdown(contended(kind, 0).play(careless).times[-1000:]) >= 0.03


@pytest.mark.parametrize("seed", [22, 42, 83])
def test_nothing_is_pooled_where_turns_would_last_too_long(seed: int) -> None:
    """Slow links whose loads also slow the compute: requests are preempted, as without a pool."""
    case = random_case(seed, contended=True)
    pie, stock = run(case), cases.stock(case, with_ring=False)
    assert pie.preemptions > 0
    assert pie.throughput >= 0.98 * stock.throughput


def test_a_link_that_feeds_nothing_is_no_worse_than_none() -> None:
    """Short chats of long blocks: half of what a waiting request holds is its tail."""
    profile = Profile(1e8, 0.08, 0.003, 0.001, 0.0005, 1 / 30)
    jobs = [Job(0.0, 36 + i % 9, 300) for i in range(32)]
    sizes = Geometry(30, 196_608, 34, 80, 2, 80, 30, 4096)
    decider = Decider(sizes.row_bytes, sizes.pooled_blocks)
    pie = Simulation(sizes, profile, jobs, decider, block_size=128).run()
    without = Geometry(30, 196_608, 34, 1, 2, 1, 30, 4096)
    stock = Simulation(without, profile, jobs, Static(0), block_size=128).run()
    assert stock.preemptions > 5
    assert pie.throughput >= 0.95 * stock.throughput


def test_idle_memory_moves_nothing() -> None:
    """A load that fits the device is served as by stock, and no byte moves."""
    case = random_case(23)
    pie = run(case)
    assert sum(pie.loads) == 0
    assert pie.throughput == pytest.approx(cases.stock(case, with_ring=True).throughput)

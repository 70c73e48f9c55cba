"""Sudden changes of load and machine, in simulation, and how steps go before and after."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.simulated.cases import LAYERS, geometry, scattered
from pie_vllm.config import TARGET_SLOWDOWN_DEFAULT
from pie_vllm.policy.control.decider import Decider, Decides
from pie_vllm.simulation.simulator import Simulation
from pie_vllm.simulation.traces import Job, Outcome, Profile

GEOMETRY = geometry(300, 400)
BEFORE = Profile(2e10, 0.015, 2e-5, 5e-5, 1e-5, 1 / LAYERS)
"""A step of 19 ms, in which the link brings 180 of 400 pooled blocks."""

SHIFT = 8.0
"""Time of the shift in seconds, after some 400 steps."""
AFTER = 12.0
"""Seconds that the load goes on after the shift; some 600 steps."""

NAMES = ("load doubles", "link halves", "long prompts")
BEYOND = "prompts beyond the link"
"""Prompts of more blocks each than the limit: it swings, and few traces settle in 50 steps."""
SETTLE = 50
LONG_RUN = range(100, 300)
"""Steps after the shift that stand for the long run."""
NEAR = 0.2
"""How far a limit may be from its mean in the long run."""
STALL = 1.1 * TARGET_SLOWDOWN_DEFAULT
"""Of 50 steps: between two cuts steps stall a little more, and a little less, than the target."""


def _chats(rng: random.Random, rate: float, begin: float, end: float) -> list[Job]:
    """``rate`` chats a second, of some 6 seconds each: as many as are in flight come at once."""

    def prompt() -> int:
        return rng.randint(150, 250)

    jobs = [Job(begin, prompt(), rng.randint(20, 400)) for _ in range(int(6 * rate))]
    now = begin
    while (now := now + rng.expovariate(rate)) < end:
        jobs.append(Job(now, prompt(), rng.randint(200, 400)))
    return jobs


@dataclass(frozen=True)
class Shift:
    """One change, at ``SHIFT`` seconds.

    Attributes:
        name: name of the change, one of ``NAMES`` or ``BEYOND``.
        jobs: jobs of the trace.
        after: the machine after it.
        before: the machine before it.
        noise: standard deviation of a step's compute, as a share of it.
    """

    name: str
    jobs: list[Job]
    after: Profile
    before: Profile = BEFORE
    noise: float = 0.0

    def play(self, decider: Decides | None = None) -> Outcome:
        """Simulate it, by pie's own decider unless another is given."""
        decider = decider or Decider(GEOMETRY.row_bytes, GEOMETRY.pooled_blocks)
        changes = [(SHIFT, self.after)]
        scatter = scattered(self.noise)
        simulation = Simulation(
            GEOMETRY, self.before, self.jobs, decider, changes=changes, scatter=scatter
        )
        return simulation.run()


def shift(name: str, seed: int) -> Shift:
    """A random trace with the change of that name; long prompts are of 2,000 or of 750 tokens."""
    rng = random.Random(seed)
    end = SHIFT + AFTER
    after = BEFORE
    jobs = _chats(rng, 4 if name == "link halves" else 2.5, 0.0, end)
    if name == "load doubles":
        jobs += _chats(rng, 2.5, SHIFT, end)
    elif name == "link halves":
        after = replace(BEFORE, link=BEFORE.link / 2)
    else:
        count, least, most = (8, 600, 900) if name == "long prompts" else (6, 1500, 2500)
        jobs += [Job(SHIFT, rng.randint(least, most), rng.randint(200, 400)) for _ in range(count)]
    return Shift(name, sorted(jobs), after)


def first_after(outcome: Outcome) -> int:
    """The first step that begins after the shift."""
    return next(i for i, time in enumerate(outcome.times) if time.began >= SHIFT)


def stall_share(outcome: Outcome, steps: Sequence[int]) -> float:
    """Stall of these steps as a share of the rest of their time, as the target counts it."""
    times = [outcome.times[i] for i in steps]
    return sum(time.stall for time in times) / sum(time.compute for time in times)


def mean_limit(outcome: Outcome, steps: Sequence[int]) -> float:
    """Mean admission limit of these steps."""
    return sum(outcome.decisions[i].pooled_admission_max for i in steps) / len(steps)


@dataclass(frozen=True)
class Settling:
    """How the steps went after a shift.

    Attributes:
        limit: mean admission limit in the long run, in blocks.
        least, most: extremes of the mean limit of settled windows, as shares of it.
        stall: greatest stall share of a settled window.
        first_stall: stall share of the first ``SETTLE`` steps after the shift.
    """

    limit: float
    least: float
    most: float
    stall: float
    first_stall: float

    @property
    def reached(self) -> bool:
        """Settled: limits near the long run's, and stall near the target."""
        return self.least >= 1 - NEAR and self.most <= 1 + NEAR and self.stall <= STALL


def settling(outcome: Outcome) -> Settling:
    """Judge the steps after the shift."""
    first = first_after(outcome)
    limit = mean_limit(outcome, [first + i for i in LONG_RUN])
    windows = list(settled_windows(first))
    limits = [mean_limit(outcome, window) / limit for window in windows]
    stall = max(stall_share(outcome, window) for window in windows)
    first_stall = stall_share(outcome, range(first, first + SETTLE))
    return Settling(limit, min(limits), max(limits), stall, first_stall)


def settled_windows(first: int) -> Iterator[range]:
    """Each run of ``SETTLE`` steps that begins ``SETTLE`` or more after the shift."""
    for begin in range(first + SETTLE, first + LONG_RUN.stop - SETTLE + 1):
        yield range(begin, begin + SETTLE)


def tokens_per_second(outcome: Outcome, steps: Sequence[int]) -> float:
    """Throughput of these steps."""
    times = [outcome.times[i] for i in steps]
    return sum(t.tokens for t in times) / sum(t.compute + t.stall for t in times)

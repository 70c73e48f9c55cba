"""Random machines and traces for the simulator, by seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.policy.control.decider import Decider, Decides, Decision
from pie_vllm.simulation.simulator import Simulation, run_stock
from pie_vllm.simulation.traces import Job, Outcome, Profile

LAYERS, PAGE_BYTES, RING_SLOTS, GRANULARITY = 32, 65536, 3, 4096
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """A machine and a trace.

    Attributes:
        geometry: sizes of both tiers.
        profile: times of the machine.
        jobs: the trace.
        noise: standard deviation of a step's compute, as a share of it.
        caching: whether there is a prefix cache, on stock's side too.
        parking: eviction policy of parked KV; None parks nothing.
    """

    geometry: Geometry
    profile: Profile
    jobs: list[Job]
    noise: float = 0.0
    caching: bool = False
    parking: str | None = None

    def decider(self) -> Decider:
        """Pie's decider over these sizes."""
        return Decider(
            self.geometry.row_bytes, self.geometry.pooled_blocks, block_tokens=BLOCK_TOKENS
        )

    def simulation(self, decider: Decides) -> Simulation:
        """The trace on the machine."""
        return Simulation(
            self.geometry,
            self.profile,
            self.jobs,
            decider,
            block_size=BLOCK_TOKENS,
            scatter=scattered(self.noise),
            caching=self.caching,
            parking=self.parking,
        )


def scattered(noise: float) -> Callable[[], float] | None:
    """Factors of the compute of step after step, the same each time; None without noise."""
    if not noise:
        return None
    rng = random.Random(1)
    return lambda: max(0.5, rng.gauss(1.0, noise))


def geometry(resident: int, pooled: int) -> Geometry:
    """32 layers with pages of 64 KiB: a block of 16 tokens of an 8B model takes 2 MiB."""
    return Geometry(LAYERS, PAGE_BYTES, resident, pooled, RING_SLOTS, pooled, LAYERS, GRANULARITY)


def contending(profile: Profile, sizes: Geometry, link_share: float, fixed: float) -> Profile:
    """The machine, with loads that slow the compute beside them.

    Args:
        profile: times of the machine.
        sizes: sizes of both tiers.
        link_share: seconds lost for each second that the link is busy.
        fixed: seconds lost in each step that loads anything.
    """
    per_load = link_share * sizes.row_bytes / profile.link
    return replace(profile, per_load=per_load, per_streaming_step=fixed)


def random_case(seed: int, *, contended: bool = False) -> Case:
    """200 to 600 resident, 100 to 800 pooled blocks, links of 0.3 to 400 GB/s, 40 to 120 jobs.

    Args:
        seed: seed of machine and trace.
        contended: whether loads slow the compute beside them, by up to a tenth of the link's time
            and up to 3 % of the step whatever they load, and steps scatter by 2 %.
    """
    rng = random.Random(seed)
    resident, pooled = rng.randint(200, 600), rng.randint(100, 800)
    profile = Profile(
        link=10 ** rng.uniform(8.5, 11.6),
        base=rng.uniform(0.005, 0.03),
        per_request=rng.uniform(0, 5e-5),
        per_prompt_token=rng.uniform(1e-5, 1e-4),
        per_block=rng.uniform(0, 2e-5),
        exposed=1 / LAYERS,
    )
    jobs = []
    now, rate = 0.0, rng.uniform(5, 40)
    for _ in range(rng.randint(40, 120)):
        now += rng.expovariate(rate)
        jobs.append(Job(now, rng.randint(10, 400), rng.randint(10, 300)))
    sizes = geometry(resident, pooled)
    if contended:
        link_share, step_share = rng.uniform(0, 0.1), rng.uniform(0, 0.03)
        fixed = step_share * profile.step_seconds(20, 0, resident)
        profile = contending(profile, sizes, link_share, fixed)
    return Case(sizes, profile, jobs, 0.02 if contended else 0.0)


def stock(case: Case, *, with_ring: bool) -> Outcome:
    """Stock vLLM on the same device: the residents, and the ring's bytes as further ones."""
    ring = RING_SLOTS * case.geometry.pooled_blocks // LAYERS if with_ring else 0
    blocks = case.geometry.resident_blocks + ring
    scatter = scattered(case.noise)
    return run_stock(blocks, case.profile, case.jobs, scatter=scatter, caching=case.caching)


class _LimitAt(Decider):
    """The decider's budget, and a fixed admission limit."""

    def __init__(self, limit: int, *args: Any) -> None:
        super().__init__(*args)
        self._limit = limit

    def decide(self, prompt_tokens: int = 0) -> Decision:
        return super().decide(prompt_tokens)._replace(pooled_admission_max=self._limit)


def limit_at(case: Case, share: float) -> Decider:
    """The case's decider with its admission limit fixed at a share of the window."""
    window = case.geometry.pooled_blocks
    return _LimitAt(int(share * window), case.geometry.row_bytes, window)

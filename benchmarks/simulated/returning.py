"""Random machines and traces with chats that come back, for parking in simulation."""

from __future__ import annotations

import random
from dataclasses import replace

from benchmarks.simulated.cases import BLOCK_TOKENS, LAYERS, Case, geometry
from pie_vllm.policy.control.decider import Decider, Decision
from pie_vllm.simulation.traces import Job, Profile


def returning_case(seed: int) -> Case:
    """200 to 600 resident, 50 to 300 pooled blocks, rows for up to 4 times the residents beyond.

    Links of 0.3 to 100 GB/s in each direction, 30 to 80 chats that begin within seconds, of one to
    four turns. More arrive at once than fit the device, so that requests are preempted, too.

    Args:
        seed: seed of machine and trace.
    """
    rng = random.Random(seed)
    resident, pooled = rng.randint(200, 600), rng.randint(50, 300)
    rows = pooled + int(rng.uniform(0.5, 4) * resident)
    link = 10 ** rng.uniform(8.5, 11)
    profile = Profile(
        link=link,
        base=rng.uniform(0.005, 0.03),
        per_request=rng.uniform(0, 5e-5),
        per_prompt_token=rng.uniform(1e-5, 1e-4),
        per_block=rng.uniform(0, 2e-5),
        exposed=1 / LAYERS,
        store_link=link,
    )
    sizes = replace(geometry(resident, pooled), rows=rows)
    return Case(sizes, profile, _chats(rng), caching=True, parking="lru")


def _chats(rng: random.Random) -> list[Job]:
    """Turns of all chats, in the order in which the chats begin."""
    jobs: list[Job] = []
    now, rate, pause = 0.0, rng.uniform(5, 40), rng.uniform(0.1, 5)
    for _ in range(rng.randint(30, 80)):
        now += rng.expovariate(rate)
        jobs.append(Job(now, rng.randint(10, 400), rng.randint(10, 300)))
        for _ in range(rng.randint(0, 3)):
            wait, after = rng.expovariate(1 / pause), len(jobs) - 1
            jobs.append(Job(wait, rng.randint(10, 200), rng.randint(10, 300), after))
    return jobs


class _Always(Decider):
    """The decider with its choice fixed: parked KV is always restored, or never."""

    def __init__(self, case: Case, restores: bool) -> None:
        row_bytes, window = case.geometry.row_bytes, case.geometry.pooled_blocks
        super().__init__(row_bytes, window, block_tokens=BLOCK_TOKENS)
        self._restores = restores

    def decide(self, prompt_tokens: int = 0) -> Decision:
        return super().decide(prompt_tokens)._replace(restore_enabled=self._restores)


def always(case: Case, *, restores: bool) -> Decider:
    """The case's decider with its choice fixed: it always restores parked KV, or computes it."""
    return _Always(case, restores)

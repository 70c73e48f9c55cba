"""Chats that come, return and go for hours: how long are the runs of blocks that steps load?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.simulated.gpu_machines import (
    BLOCK_TOKENS,
    H200,
    MACHINES,
    MAX_NUM_SEQS,
    Machine,
    Model,
)
from pie_vllm.geometry import Geometry, cdiv
from pie_vllm.plan import NO_RUNS, Runs, StepOrders, num_copied
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.scheduler import Request
from pie_vllm.simulation.simulator import Simulation
from pie_vllm.simulation.traces import Job, StepCost

TURNS = 3
FOLLOW_UPS = 50, 400
"""Least and most tokens of a later turn's prompt."""

EXCESS = 1.25
"""Chats that come, as a share of those that both tiers serve."""

GH200 = replace(MACHINES[0], store_link=297e9)
"""With the speed back that the same source measured."""

GPUS = {
    "gh200_70b": replace(
        GH200,
        flops=1979e12,
        kv_bytes=int(13.5e9),
        model=Model(80, weight_bytes=70.6e9, flops_per_token=2 * 70e9),
    ),
    "gh200_8b": replace(GH200, kv_bytes=int(60e9)),
    "h200_8b": replace(H200, kv_bytes=int(20e9), store_link=55e9),
}
"""What each name of the command line is; the large model's weights and sums have 8 bits."""


class Lengths(NamedTuple):
    """Tokens of the chats, least and most.

    Attributes:
        prompts: of a chat's first prompt.
        answers: of an answer.
    """

    prompts: tuple[int, int] = (3000, 5000)
    answers: tuple[int, int] = (200, 800)

    @property
    def longest(self) -> int:
        """Blocks of the longest chat at its end."""
        more = (TURNS - 1) * FOLLOW_UPS[1] + TURNS * self.answers[1]
        return cdiv(self.prompts[1] + more, BLOCK_TOKENS)


LENGTHS = Lengths()


class Copies(NamedTuple):
    """Copies of one kind over a number of steps.

    Attributes:
        runs: number of runs.
        blocks: number of blocks in them.
    """

    runs: int = 0
    blocks: int = 0

    @property
    def mean(self) -> float:
        """Mean number of blocks of a run; 0 without one."""
        return self.blocks / self.runs if self.runs else 0.0

    def plus(self, copies: Runs) -> Copies:
        """With the runs of a plan."""
        return Copies(self.runs + len(copies), self.blocks + num_copied(copies))


class Window(NamedTuple):
    """What some steps in a row copied.

    Attributes:
        step: number of the last one.
        seconds: time on the machine's clock after it.
        pooled: number of pooled blocks in use.
        parked: number of rows that hold parked KV.
        loads, promotions, stores: copies of these steps.
    """

    step: int
    seconds: float
    pooled: int
    parked: int
    loads: Copies
    promotions: Copies
    stores: Copies


class _EnoughError(Exception):
    """So many steps were played."""


class Churn(Simulation):
    """A simulation that counts the runs of its plans.

    Attributes:
        windows: What was counted, in order.
    """

    def __init__(self, steps: int, every: int, *args: Any, **options: Any) -> None:
        """Play ``steps`` steps, counted in windows of ``every``."""
        super().__init__(*args, **options)
        self._left, self._every = steps, every
        self._current = NO_RUNS
        self._counted = [Copies()] * 3
        self.windows: list[Window] = []

    def play(self) -> list[Window]:
        """All windows."""
        with suppress(_EnoughError):
            self.run(self._left + 1)
        return self.windows

    def _cost(self, orders: StepOrders, ran: Sequence[Request], tokens: int) -> StepCost:
        plan, residency = orders.plan, self.residency
        loads, promotions, stores = self._counted
        if plan is not None:
            if plan.loads is not None:
                self._current = plan.loads
            loads = loads.plus(self._current)
            promotions, stores = promotions.plus(plan.promotions), stores.plus(plan.stores)
        self._counted = [loads, promotions, stores]
        self._left -= 1
        if self._number % self._every == 0 or not self._left:
            pooled, parked = residency.pooled_in_use, residency.rows.num_parked
            self.windows.append(Window(self._number, self._clock, pooled, parked, *self._counted))
            self._counted = [Copies()] * 3
        if not self._left:
            raise _EnoughError
        return super()._cost(orders, ran, tokens)


def chats(machine: Machine, lengths: Lengths, sizes: Geometry, steps: int) -> list[Job]:
    """Chats of several turns for so many steps, somewhat more of them than can be served."""
    rng = random.Random(2)
    prompt, answer = sum(lengths.prompts) / 2, sum(lengths.answers) / 2
    blocks = (prompt + 500 + answer * TURNS / 2) / BLOCK_TOKENS
    fit = min((sizes.resident_blocks + sizes.pooled_blocks) / blocks, MAX_NUM_SEQS)
    step = machine.profile().step_seconds(int(fit), 0, sizes.resident_blocks)
    rate = EXCESS * fit / (answer * step) / TURNS
    jobs: list[Job] = []
    now = 0.0
    for _ in range(int(steps * step * rate * 1.3) + 50):
        now += rng.expovariate(rate)
        jobs.append(Job(now, rng.randint(*lengths.prompts), rng.randint(*lengths.answers)))
        for _ in range(TURNS - 1):
            more = rng.randint(*FOLLOW_UPS), rng.randint(*lengths.answers)
            jobs.append(Job(rng.uniform(5, 40), *more, after=len(jobs) - 1))
    return jobs


def churn(
    machine: Machine,
    steps: int,
    every: int,
    *,
    lengths: Lengths = LENGTHS,
    parking: bool = True,
) -> Churn:
    """The simulation of so many steps on a machine, not played yet."""
    sizes = machine.geometry(lengths.longest)
    decider = Decider(
        sizes.row_bytes, sizes.pooled_blocks, prior=machine.prior(), block_tokens=BLOCK_TOKENS
    )
    return Churn(
        steps,
        every,
        sizes,
        machine.profile(),
        chats(machine, lengths, sizes, steps),
        decider,
        block_size=BLOCK_TOKENS,
        max_running=MAX_NUM_SEQS,
        max_tokens=8192,
        caching=parking,
        parking="lru" if parking else None,
    )

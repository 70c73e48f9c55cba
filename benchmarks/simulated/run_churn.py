"""Chats that come, return and go for hours: how long are the runs of blocks that steps load?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from pie_vllm.geometry import Geometry, blocks_fed, cdiv, plan_geometry
from pie_vllm.plan import Prior, StepOrders
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.scheduler import Request
from pie_vllm.simulation.simulator import Simulation
from pie_vllm.simulation.traces import Job, Profile, StepCost

BLOCK_TOKENS = 16
TURNS = 3
FOLLOW_UPS = 50, 400
"""Least and most tokens of a later turn's prompt."""

EXCESS = 1.25
"""Chats that come, as a share of those that both tiers serve."""


@dataclass(frozen=True)
class Machine:
    """A machine with a model, in bytes, seconds and tokens.

    Attributes:
        layers: number of attention layers.
        page: bytes of a block in one layer.
        device: bytes for KV on the device.
        pool: bytes for KV on the CPU.
        link: bytes per second from the CPU to the device.
        store_link: bytes per second back.
        step: seconds of a step that decodes, without attention.
        per_prompt_token: seconds for each prompt token.
        memory: bytes per second that the device reads.
        prompts: least and most tokens of a chat's first prompt.
        answers: least and most tokens of an answer.
    """

    layers: int
    page: int
    device: int
    pool: int
    link: float
    store_link: float
    step: float
    per_prompt_token: float
    memory: float
    prompts: tuple[int, int] = (3000, 5000)
    answers: tuple[int, int] = (200, 800)

    @property
    def row(self) -> int:
        """Bytes of a block in all layers."""
        return self.layers * self.page

    @property
    def longest(self) -> int:
        """Blocks of the longest chat at its end."""
        more = (TURNS - 1) * FOLLOW_UPS[1] + TURNS * self.answers[1]
        return cdiv(self.prompts[1] + more, BLOCK_TOKENS)

    @property
    def profile(self) -> Profile:
        """Its times."""
        return Profile(
            link=self.link,
            base=self.step,
            per_request=1e-5,
            per_prompt_token=self.per_prompt_token,
            per_block=self.row / self.memory,
            exposed=1 / self.layers,
            store_link=self.store_link,
        )

    def geometry(self) -> Geometry:
        """What a server on it starts with."""
        return plan_geometry(
            num_layers=self.layers,
            page_bytes=self.page,
            device_bytes=self.device,
            pool_bytes=self.pool,
            granularity=2 << 20,
            needed_blocks=self.longest,
            fed_blocks=blocks_fed(self.link, self.step, self.row),
            link_bytes_per_s=self.link,
        )


MACHINES = {
    "gh200_70b": Machine(
        layers=80,
        page=65536,
        device=int(13.5e9),
        pool=int(54e9),
        link=377e9,
        store_link=297e9,
        step=70.6e9 / 3.7e12 + 2e-3,
        per_prompt_token=2 * 70e9 / (0.5 * 1979e12),
        memory=3.7e12,
    ),
    "gh200_8b": Machine(
        layers=32,
        page=65536,
        device=int(60e9),
        pool=int(240e9),
        link=377e9,
        store_link=297e9,
        step=16.1e9 / 3.7e12 + 2e-3,
        per_prompt_token=2 * 8e9 / (0.5 * 989e12),
        memory=3.7e12,
    ),
    "h200_8b": Machine(
        layers=32,
        page=65536,
        device=int(20e9),
        pool=int(80e9),
        link=55e9,
        store_link=55e9,
        step=16.1e9 / 4.0e12 + 2e-3,
        per_prompt_token=2 * 8e9 / (0.5 * 989e12),
        memory=4.0e12,
    ),
}


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

    def plus(self, copies: Any) -> Copies:
        """With the runs of a plan."""
        counts = [int(count) for _, _, count in copies]
        return Copies(self.runs + len(counts), self.blocks + sum(counts))


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
        self._current: Any = ()
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


def chats(machine: Machine, sizes: Geometry, steps: int) -> list[Job]:
    """Chats of several turns for so many steps, somewhat more of them than can be served."""
    rng = random.Random(2)
    prompt, answer = sum(machine.prompts) / 2, sum(machine.answers) / 2
    blocks = (prompt + 500 + answer * TURNS / 2) / BLOCK_TOKENS
    fit = min((sizes.resident_blocks + sizes.pooled_blocks) / blocks, 256)
    step = machine.profile.step_seconds(int(fit), 0, sizes.resident_blocks)
    rate = EXCESS * fit / (answer * step) / TURNS
    jobs: list[Job] = []
    now = 0.0
    for _ in range(int(steps * step * rate * 1.3) + 50):
        now += rng.expovariate(rate)
        jobs.append(Job(now, rng.randint(*machine.prompts), rng.randint(*machine.answers)))
        for _ in range(TURNS - 1):
            more = rng.randint(*FOLLOW_UPS), rng.randint(*machine.answers)
            jobs.append(Job(rng.uniform(5, 40), *more, after=len(jobs) - 1))
    return jobs


def churn(machine: Machine, steps: int, every: int, *, parking: bool = True) -> Churn:
    """The simulation of so many steps on a machine, not played yet."""
    sizes = machine.geometry()
    prior = Prior(machine.link, step_seconds=machine.step)
    decider = Decider(sizes.row_bytes, sizes.pooled_blocks, prior=prior, block_tokens=BLOCK_TOKENS)
    return Churn(
        steps,
        every,
        sizes,
        machine.profile,
        chats(machine, sizes, steps),
        decider,
        block_size=BLOCK_TOKENS,
        max_running=256,
        max_tokens=8192,
        caching=parking,
        parking="lru" if parking else None,
    )

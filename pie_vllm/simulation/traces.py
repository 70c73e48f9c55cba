"""What a simulation is given and what it returns: machines, traces, outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.control.detector import Detector, Observation


@dataclass(frozen=True)
class Profile:
    """How long things take on a machine with one model.

    Attributes:
        link: bytes per second from the CPU to the device.
        base: seconds of a step, whatever it computes.
        per_request: seconds for each request that runs.
        per_prompt_token: seconds for each prompt token.
        per_block: seconds to read one block of context on the device.
        exposed: share of a step's loads that no compute hides: the first layer's.
        per_load: seconds by which the load of one block slows the compute beside it: memory
            bandwidth that they share. None on most GPUs, much on a CPU.
        per_streaming_step: seconds that a step takes longer when it loads anything.
        store_link: bytes per second from the device to the CPU, whatever is loaded meanwhile; as
            of loads, a share of ``exposed`` of a step's stores is hidden by no compute. None is at
            once.
    """

    link: float
    base: float
    per_request: float
    per_prompt_token: float
    per_block: float
    exposed: float = 0.0
    per_load: float = 0.0
    per_streaming_step: float = 0.0
    store_link: float | None = None

    def step_seconds(self, requests: int, prompt_tokens: int, blocks: int) -> float:
        """Seconds that a step computes, with all its KV on the device.

        Args:
            requests: that run.
            prompt_tokens: computed beyond one for each request.
            blocks: that these requests hold.
        """
        return (
            self.base
            + self.per_request * requests
            + self.per_prompt_token * prompt_tokens
            + self.per_block * blocks
        )

    def load_cost(self, loads: int) -> float:
        """Seconds by which so many loads of blocks slow the compute beside them."""
        return self.per_streaming_step + self.per_load * loads if loads else 0.0

    def step(self, compute: float, loads: int, stores: int, row_bytes: int) -> StepCost:
        """How long a step takes that copies.

        Args:
            compute: seconds of the step with all its KV on the device.
            loads: blocks that come to the device.
            stores: blocks that go to the CPU.
            row_bytes: of a block.
        """
        slowed = self.load_cost(loads)
        compute += slowed
        load = loads * row_bytes / self.link
        stall = max(load - compute, load * self.exposed)
        if self.store_link is not None:
            store = stores * row_bytes / self.store_link
            stall = max(stall, store - compute, store * self.exposed)
        return StepCost(compute, stall, slowed, load)


class StepCost(NamedTuple):
    """How long a step takes.

    Attributes:
        compute: Seconds, with those that loads take from it.
        stall: Seconds that it waits for copies.
        slowed: Seconds of ``compute`` that loads took from it.
        load: Seconds that the link is busy with loads.
    """

    compute: float
    stall: float
    slowed: float
    load: float

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.compute + self.stall


class Job(NamedTuple):
    """One request, which may be a turn of a chat.

    Attributes:
        arrival: seconds on the clock; of a turn that continues a chat, after the last answer.
        prompt: tokens, without those of the turns before.
        answer: tokens.
        after: number in the trace of the job whose prompt and answer come first in the prompt;
            None begins a chat.
    """

    arrival: float
    prompt: int
    answer: int
    after: int | None = None


class StepTime(NamedTuple):
    """One step.

    Attributes:
        began: seconds on the clock.
        compute: seconds, what loads took from it included.
        stall: seconds that it waited for loads.
        tokens: answered.
        slowed: of ``compute``, what loads took from it.
    """

    began: float
    compute: float
    stall: float
    tokens: int
    slowed: float


def slowdown(times: Sequence[StepTime]) -> float:
    """Time of these steps over that of the same with all KV on the device, less 1."""
    lost = sum(time.stall + time.slowed for time in times)
    return lost / (sum(time.compute + time.stall for time in times) - lost)


class Outcome(NamedTuple):
    """What a trace took.

    Attributes:
        seconds: until the last request was done.
        tokens: answered.
        stall_seconds: waited for loads.
        steps: run.
        preemptions: each of which gives all blocks of a request back.
        left_out: requests left out of steps.
        loads: blocks that each step loaded.
        decisions: of each step.
        times: of each step.
        first_tokens: seconds from the arrival of each job to its first token.
        prompt_tokens: computed, those that were computed before included.
        recomputed_tokens: computed again after preemption, answered ones included.
        parked: blocks stored for parking.
        restored: parked blocks and tails that came back to requests.
        lost: cached blocks that were not kept.
    """

    seconds: float
    tokens: int
    stall_seconds: float
    steps: int
    preemptions: int
    left_out: int
    loads: list[int]
    decisions: list[Decision]
    times: list[StepTime]
    first_tokens: list[float]
    prompt_tokens: int
    recomputed_tokens: int
    parked: int
    restored: int
    lost: int

    @property
    def throughput(self) -> float:
        """Tokens answered per second."""
        return self.tokens / self.seconds


class Static:
    """The same limit in every step: what the decider is measured against.

    Attributes:
        detector: Knows nothing.
    """

    def __init__(self, limit: int, budget: int | None = None, spare: int = 0) -> None:
        """Admit up to ``limit`` pooled blocks; load up to ``budget``, ``limit`` if None."""
        self._decision = Decision(
            load_blocks_max=limit if budget is None else budget,
            pooled_admission_max=limit,
            spare_load_blocks_max=spare,
        )
        self.detector = Detector()

    def decide(self, prompt_tokens: int = 0) -> Decision:  # noqa: ARG002
        """Always the same."""
        return self._decision

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn nothing."""

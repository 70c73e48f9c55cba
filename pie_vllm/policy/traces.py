"""What a simulation is given and what it returns: machines, traces, outcomes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pie_vllm.policy.decider import Decision
from pie_vllm.policy.detector import Observation


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
    """

    link: float
    base: float
    per_request: float
    per_prompt_token: float
    per_block: float
    exposed: float = 0.0
    per_load: float = 0.0
    per_streaming_step: float = 0.0

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


class Job(NamedTuple):
    """One request: when it comes (seconds), its prompt and its answer (tokens)."""

    arrival: float
    prompt: int
    answer: int


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
        preemptions: with recomputation.
        left_out: requests left out of steps.
        loads: blocks that each step loaded.
        decisions: of each step.
        times: of each step.
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

    @property
    def throughput(self) -> float:
        """Tokens answered per second."""
        return self.tokens / self.seconds


class Decides(Protocol):
    """A Decider, or something in its place."""

    def decide(self, prompt_tokens: int = 0) -> Decision:
        """For the step that is about to be scheduled."""

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn from a step."""


class Static:
    """The same limit in every step: what the decider is measured against."""

    def __init__(self, limit: int, budget: int | None = None, spare: int = 0) -> None:
        """Admit up to ``limit`` pooled blocks; load up to ``budget``, ``limit`` if None."""
        self._decision = Decision(limit if budget is None else budget, limit, spare)

    def decide(self, prompt_tokens: int = 0) -> Decision:  # noqa: ARG002
        """Always the same."""
        return self._decision

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn nothing."""


class Block:
    """What the policy needs of vLLM's ``KVCacheBlock``."""

    __slots__ = ("block_hash", "block_id", "is_null", "ref_cnt")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.is_null = False
        self.block_hash: Any = None


class Free:
    """A free list of blocks without cached content."""

    def __init__(self, blocks: list[Any]) -> None:
        self._blocks: deque[Any] = deque(blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the list."""
        return len(self._blocks)

    def popleft(self) -> Any:
        """Take the first block."""
        return self._blocks.popleft()

    def popleft_n(self, n: int) -> list[Any]:
        """Take the first ``n`` blocks."""
        return [self._blocks.popleft() for _ in range(n)]

    def remove(self, block: Any) -> None:
        """Take a given block out."""
        self._blocks.remove(block)

    def append_n(self, blocks: list[Any]) -> None:
        """Put blocks back as the last."""
        self._blocks.extend(blocks)

    def prepend_n(self, blocks: list[Any]) -> None:
        """Put blocks back as the first."""
        self._blocks.extendleft(reversed(blocks))

    def get_all_free_blocks(self) -> list[Any]:
        """All blocks, in order."""
        return list(self._blocks)

    def iter_blocks_after(self, cursor: None) -> Iterator[Any]:  # noqa: ARG002
        """All blocks, in order."""
        return iter(self._blocks)

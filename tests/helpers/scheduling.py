"""vLLM's real schedulers over a runner of tags, step by step."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus

from benchmarks.real import bare_schedulers
from benchmarks.real.bare_schedulers import geometry, make_request, vllm_config
from pie_vllm.geometry import Geometry
from pie_vllm.vllm.scheduler_side.scheduler import make_scheduler
from tests.helpers.plancheck import plan_check
from tests.helpers.states import aligned
from tests.helpers.tagrunner import TagRunner, continuation

__all__ = [
    "Driver",
    "Preemption",
    "geometry",
    "make",
    "make_request",
    "random_load",
    "vllm_config",
]


GROWTH_SECONDS = 10.0
"""Seconds for which a step that runs nothing may be one that waits for the pool's memory: that
comes in a thread, which other processes may keep from its core."""


def make(
    sizes: Geometry,
    block_size: int = 16,
    *,
    flavour: Any = make_scheduler,
    checkpoints: bool = False,
    **options: Any,
) -> Any:
    """As ``bare_schedulers.make``; with a prefix cache states are as vLLM keeps them then."""
    flavour = aligned(flavour, block_size, checkpoints)
    return bare_schedulers.make(sizes, block_size, flavour, **options)


class Preemption(NamedTuple):
    """A preemption.

    Attributes:
        request_id: whose blocks were taken.
        free: blocks of both tiers free then, without those withheld for want of CPU memory.
        asked: blocks asked for in vain.
        frozen: nothing was demoted, because requests that wait for the link held too much.
    """

    request_id: str
    free: int
    asked: int
    frozen: bool


class Driver:
    """Runs a scheduler over a runner, with ``in_flight`` steps at once.

    Attributes:
        answers: tokens of each finished request.
        preemptions: all preemptions so far.
        output: of the newest ``schedule``.
    """

    def __init__(
        self, scheduler: Any, runner: TagRunner, *, in_flight: int = 1, check: bool = True
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.in_flight = in_flight
        self.check = check
        self.queue: deque[tuple[Any, Any, int]] = deque()
        self.drafts: deque[dict[str, list[int]]] = deque()
        self.prompts: dict[str, list[int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.steps = 0
        self.idle = 0
        self._idle_since = 0.0
        self.preemptions: list[Preemption] = []
        self.output: Any = None
        self.asked = 0
        self.plans = plan_check(scheduler.kv_cache_manager)
        original = scheduler._preempt_request

        def preempt(request: Request, *args: Any, **kwargs: Any) -> None:
            queue = scheduler.kv_cache_manager.residency.queue
            self.preemptions.append(
                Preemption(
                    request.request_id,
                    queue.free_residents + queue.available_pooled,
                    self.asked,
                    queue.frozen,
                )
            )
            original(request, *args, **kwargs)

        scheduler._preempt_request = preempt
        coordinator = scheduler.kv_cache_manager.coordinator
        blocks_needed = coordinator.get_num_blocks_to_allocate

        def needed(*args: Any, **kwargs: Any) -> int:
            self.asked = int(blocks_needed(*args, **kwargs))
            return self.asked

        coordinator.get_num_blocks_to_allocate = needed

    def add(self, request: Request) -> None:
        self.prompts[request.request_id] = list(request.prompt_token_ids or [])
        self.answers[request.request_id] = []
        lora = request.lora_request
        self.runner.salts[request.request_id] = f"{request.cache_salt} {lora and lora.lora_name}"
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.prompts.pop(request_id, None)
        self.answers.pop(request_id, None)
        self._check()

    def reset(self, running: bool = True) -> bool:
        """New weights: forget all cached prefixes and preempt all requests.

        Returns:
            Whether it was done: not with ``running`` False while requests hold blocks.
        """
        kept = len(self.preemptions)
        done = bool(self.scheduler.reset_prefix_cache(reset_running_requests=running))
        del self.preemptions[kept:]  # asked for, not for want of blocks
        self.runner.weights += done
        self._check()
        return done

    def step(self) -> None:
        """Schedule and submit one step; take results when enough are in flight."""
        if self.scheduler.has_requests():
            output = self.output = self.scheduler.schedule()
            self._check()
            if self.check:
                self.plans.check(output.pie.plan, output.num_scheduled_tokens)
            result = self.runner.execute(output)
            self.queue.append((output, result, self.steps))
            self.drafts.append(self.runner.proposed)
            self.steps += 1
            self._count_idle(output.total_num_scheduled_tokens > 0)
        while len(self.queue) >= self.in_flight or (
            self.queue and not self.scheduler.has_requests()
        ):
            self._take()

    def _count_idle(self, ran: bool) -> None:
        """Count steps in a row that ran nothing, though they need not wait for memory."""
        if ran:
            self.idle, self._idle_since = 0, 0.0
            return
        self._idle_since = self._idle_since or time.monotonic()
        controller = getattr(self.scheduler, "pie_controller", None)
        pool = getattr(controller, "pool", None)
        waits = pool is not None and pool.growing
        if waits and time.monotonic() - self._idle_since < GROWTH_SECONDS:
            time.sleep(0.001)
        else:
            self.idle += 1

    def _take(self) -> None:
        output, result, step = self.queue.popleft()
        self.runner.memory.finish(step)
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                if one.request_id in self.answers:
                    self.answers[one.request_id].extend(one.new_token_ids)
        proposed = self.drafts.popleft()
        if proposed:
            self.scheduler.update_draft_token_ids(DraftTokenIds([*proposed], [*proposed.values()]))
        self._check()

    def _check(self) -> None:
        if self.check:
            self.scheduler.kv_cache_manager.residency.check_integrity()

    def run(self, most_idle: int = 20) -> None:
        """Step until all requests are done; fail when nothing moves any more."""
        while self.scheduler.has_requests() or self.queue:
            self.step()
            assert self.idle <= most_idle, "no progress: the scheduler runs nothing"

    def run_until(self, done: Callable[[], bool], most_steps: int = 500) -> None:
        """Step until something holds; fail when it never does."""
        for _ in range(most_steps):
            if done():
                return
            self.step()
        raise AssertionError(f"not so after {most_steps} steps")

    def verify(self) -> None:
        """Assert that every request that was not aborted got its answer."""
        for request_id, prompt in self.prompts.items():
            answer = self.answers[request_id]
            assert answer == continuation(prompt, len(answer)), request_id


def random_load(
    rng: random.Random, count: int, longest_prompt: int, longest_answer: int, prefixes: int
) -> list[tuple[list[int], int]]:
    """Prompts with shared prefixes, and answer lengths."""
    shared = [
        [rng.randrange(997) for _ in range(rng.randint(1, longest_prompt))] for _ in range(prefixes)
    ]
    load = []
    for _ in range(count):
        prompt: list[int] = []
        if shared and rng.random() < 0.6:
            prompt += rng.choice(shared)
        prompt += [rng.randrange(997) for _ in range(rng.randint(1, longest_prompt))]
        load.append((prompt[:longest_prompt], rng.randint(1, longest_answer)))
    return load

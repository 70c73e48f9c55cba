"""vLLM's real schedulers, pie's on top, without a model."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from mmap import PAGESIZE
from typing import Any, NamedTuple

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import pie_vllm
from pie_vllm.config import BY_NAME
from pie_vllm.geometry import Geometry
from pie_vllm.vllm import settings
from pie_vllm.vllm.scheduler_side.scheduler import make_scheduler
from tests.helpers.model import model_path
from tests.helpers.plancheck import plan_check
from tests.helpers.tagrunner import TagRunner, continuation

_ARRIVALS = itertools.count()


def geometry(resident: int, pooled: int, rows: int | None = None, **other: int) -> Geometry:
    """Small sizes: one 4 KiB page per block and layer unless said otherwise."""
    sizes = {
        "num_layers": 4,
        "page_bytes": 4096,
        "ring_slots": 2,
        "chunk_rows": 8,
        "granularity": PAGESIZE,
        **other,
    }
    return Geometry(
        resident_blocks=resident,
        pooled_blocks=pooled,
        rows=pooled if rows is None else rows,
        **sizes,
    )


@cache
def _base_config() -> VllmConfig:
    args = EngineArgs(
        model=str(model_path()),
        max_model_len=4096,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        **pie_vllm.engine_args(pool_gib=0.1),
    )
    return args.create_engine_config()


def vllm_config(
    sizes: Geometry, block_size: int, parking: str = "lru", **scheduler: Any
) -> VllmConfig:
    """A finished VllmConfig; other keywords are fields of the scheduler or cache config."""
    config = deepcopy(_base_config())
    config.cache_config.block_size = block_size
    for name, value in scheduler.items():
        owner = config.scheduler_config
        if not hasattr(owner, name):
            owner = config.model_config if name == "max_model_len" else config.cache_config
        assert hasattr(owner, name), name
        setattr(owner, name, value)
    given = settings.of(config)
    given.config = replace(given.config, parking=BY_NAME["parking"].parse(parking))
    given.geometry = sizes
    return config


def make(
    sizes: Geometry, block_size: int = 16, flavour: Any = make_scheduler, **options: Any
) -> Any:
    """The scheduler that vLLM would make over these sizes, or one of another class."""
    config = vllm_config(sizes, block_size, **options)
    layers = [f"layers.{i}" for i in range(sizes.num_layers)]
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.float32
    )
    stride = sizes.layer_stride
    tensor = KVCacheTensor(
        size=sizes.virtual_bytes, layers=layers, layer_stride=stride, block_stride=sizes.page_bytes
    )
    kv_cache_config = KVCacheConfig(
        num_blocks=sizes.num_blocks,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(layers, spec)],
    )
    config.cache_config.num_gpu_blocks = sizes.num_blocks
    return flavour(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=True,
        block_size=block_size,
        hash_block_size=block_size,
    )


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    block_size: int,
    priority: int = 0,
    **other: Any,
) -> Request:
    """A greedy request that runs to ``max_tokens``; other keywords are vLLM's ``Request``'s."""
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    parameters.update_from_generation_config({}, eos_token_id=None)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling_params=parameters,
        pooling_params=None,
        priority=priority,
        arrival_time=float(next(_ARRIVALS)),
        block_hasher=get_request_block_hasher(block_size, hash_function),
        **other,
    )


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
        self.prompts: dict[str, list[int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.steps = 0
        self.idle = 0
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
            self.steps += 1
            self.idle = 0 if output.total_num_scheduled_tokens else self.idle + 1
        while len(self.queue) >= self.in_flight or (
            self.queue and not self.scheduler.has_requests()
        ):
            self._take()

    def _take(self) -> None:
        output, result, step = self.queue.popleft()
        self.runner.memory.finish(step)
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                if one.request_id in self.answers:
                    self.answers[one.request_id].extend(one.new_token_ids)
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

"""One scheduler, vLLM's or pie's, driven step by step without a model, and timed."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from time import thread_time_ns
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from benchmarks.real import bare_schedulers
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior, StepReport
from pie_vllm.vllm.scheduler_side.scheduler import PieSchedulerMixin

BLOCK_SIZE = 16
"""Tokens of a block: the default on CUDA."""

EOS_FREE_TOKEN = 7
"""Token that every request samples; the requests ignore their end token."""


class StepTimes(NamedTuple):
    """CPU time of the scheduler's thread in one step, nanoseconds.

    Attributes:
        schedule: time of ``schedule``.
        ship: time to pickle and unpickle the step's orders for the workers; 0 for vLLM's scheduler.
        update: time of ``update_from_output``, the making of statistics included.
    """

    schedule: int
    ship: int
    update: int

    @property
    def whole(self) -> int:
        """All that the step costs the scheduler's process."""
        return self.schedule + self.ship + self.update


class _TimedInner:
    """Times the methods of the class after it: vLLM's own, wherever pie's stand around them.

    Attributes:
        inner: nanoseconds of vLLM's ``schedule`` and ``update_from_output`` in the newest step.
        allocating: part of ``inner`` in which blocks were allocated.
        admitting: part of ``inner`` in which waiting requests were looked up and given blocks.
        stats: part of ``inner`` in which vLLM made its statistics.
    """

    inner = allocating = admitting = stats = 0

    def schedule(self) -> Any:
        """As the class after this one does."""
        self.allocating = self.admitting = self.stats = 0
        start = thread_time_ns()
        output = super().schedule()  # type: ignore[misc]
        self.inner = thread_time_ns() - start
        return output

    def update_from_output(self, output: Any, result: Any) -> Any:
        """As the class after this one does."""
        start = thread_time_ns()
        outputs = super().update_from_output(output, result)  # type: ignore[misc]
        self.inner += thread_time_ns() - start
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As the class after this one does."""
        start = thread_time_ns()
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        self.stats += thread_time_ns() - start
        return stats

    def watch_admissions(self) -> None:
        """Time what the manager of blocks does for waiting requests, from now on."""
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        look_up, allocate = manager.get_computed_blocks, manager.allocate_slots

        def timed(function: Any, *args: Any, **kwargs: Any) -> Any:
            start = thread_time_ns()
            found = function(*args, **kwargs)
            self.admitting += thread_time_ns() - start
            return found

        def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
            if request.status is RequestStatus.RUNNING:
                return allocate(request, *args, **kwargs)
            return timed(allocate, request, *args, **kwargs)

        manager.get_computed_blocks = partial(timed, look_up)
        manager.allocate_slots = allocate_slots

    def watch_allocations(self) -> None:
        """Time allocations from now on."""
        pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
        allocate = pool.get_new_blocks

        def get_new_blocks(count: int) -> Any:
            start = thread_time_ns()
            blocks = allocate(count)
            self.allocating += thread_time_ns() - start
            return blocks

        pool.get_new_blocks = get_new_blocks


class _TimedOuter:
    """Times ``make_stats`` with pie's part in it.

    Attributes:
        all_stats: nanoseconds of ``make_stats`` in the newest step.
    """

    all_stats = 0

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As the class after this one does."""
        start = thread_time_ns()
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        self.all_stats = thread_time_ns() - start
        return stats


def flavour_of(*, pie: bool, asynchronous: bool = True) -> type:
    """A scheduler class that times its parts; with ``pie``, pie's stands around vLLM's."""
    plain: Any = AsyncScheduler if asynchronous else Scheduler
    bases = (_TimedOuter, PieSchedulerMixin, _TimedInner, plain) if pie else (_TimedInner, plain)
    return type(f"Timed{'Pie' if pie else ''}{plain.__name__}", bases, {})


class Side:
    """A scheduler and the engine around it, which samples the same token for everybody.

    Attributes:
        scheduler: vLLM's scheduler, or pie's.
        finished: ids of the requests that finished in the newest step.
    """

    def __init__(
        self,
        flavour: type,
        sizes: Geometry,
        *,
        requests_max: int,
        tokens_max: int,
        length_max: int,
        prior: Prior | None = None,
    ) -> None:
        """Start without requests.

        Args:
            flavour: class of the scheduler, from ``flavour_of``.
            sizes: blocks of both tiers.
            requests_max: maximum number of running requests.
            tokens_max: maximum number of tokens in a step.
            length_max: maximum number of tokens of a request.
            prior: what the workers measured at start; None for nothing.
        """
        self.scheduler: Any = bare_schedulers.make(
            sizes,
            BLOCK_SIZE,
            flavour=flavour,
            prior=prior or Prior(),
            max_num_seqs=requests_max,
            max_num_batched_tokens=tokens_max,
            max_num_scheduled_tokens=tokens_max,
            max_model_len=length_max,
            async_scheduling=issubclass(flavour, AsyncScheduler),
        )
        self.finished: list[str] = []

    def add(self, name: str, prompt: list[int], answer: int) -> None:
        """A request arrives, which ends after ``answer`` tokens."""
        request = bare_schedulers.make_request(name, prompt, answer, BLOCK_SIZE)
        self.scheduler.add_request(request)

    def step(self) -> StepTimes:
        """Schedule, ship the orders, take the results."""
        start = thread_time_ns()
        output = self.scheduler.schedule()
        scheduled_at = thread_time_ns()
        orders = getattr(output, "pie", None)
        if orders is not None:
            pickle.loads(pickle.dumps(orders, pickle.HIGHEST_PROTOCOL))
        shipped_at = thread_time_ns()
        names, requests = list(output.num_scheduled_tokens), self.scheduler.requests
        result: Any = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[
                [] if requests[name].is_prefill_chunk else [EOS_FREE_TOKEN] for name in names
            ],
        )
        result.pie = self.report(output)
        answered_at = thread_time_ns()
        outputs = self.scheduler.update_from_output(output, result)
        update = thread_time_ns() - answered_at
        self.finished = [
            one.request_id
            for of_client in (outputs or {}).values()
            for one in of_client.outputs
            if one.finished
        ]
        return StepTimes(scheduled_at - start, shipped_at - scheduled_at, update)

    def report(self, output: Any) -> StepReport | None:  # noqa: ARG002
        """What the workers say beside the tokens; None as stock's do."""
        return None

    def settle(self) -> None:
        """Step until no request waits or computes its prompt."""
        while self.scheduler.waiting or any(r.is_prefill_chunk for r in self.scheduler.running):
            self.step()

    def own(self, times: StepTimes) -> int:
        """Nanoseconds of the newest step outside vLLM's code; allocations count as vLLM's."""
        stats = getattr(self.scheduler, "all_stats", self.scheduler.stats) - self.scheduler.stats
        return int(times.whole - self.scheduler.inner + stats)


@contextmanager
def steady_heap() -> Iterator[None]:
    """Keep objects made so far out of collections, as vLLM's engine core does after its start."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def difference_of(times: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """What pie's steps take longer than stock's, microseconds: the median and its error.

    The error is that of a median, from the middle half of the differences.

    Args:
        times: of stock's and of pie's step, nanoseconds.
    """
    differences = sorted(pie - stock for stock, pie in times)
    quarter = len(differences) // 4
    middle_half = differences[-1 - quarter] - differences[quarter]
    return median(differences) / 1e3, 0.93 * middle_half / len(differences) ** 0.5 / 1e3

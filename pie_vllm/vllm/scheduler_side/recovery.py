"""Requests that a failed copy concerns are computed again; the others go on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from pie_vllm.policy.placement.in_flight import Flight

logger = init_logger("vllm.pie")

NO_DRAFTS: Mapping[str, int] = {}

MOST_IN_A_ROW = 10
"""Times that a request is computed again because of failed copies without a token in between."""

LOG_SECONDS = 10.0


def starts(output: SchedulerOutput, uncertain: Mapping[str, int] = NO_DRAFTS) -> Mapping[str, int]:
    """Position of the first token that a step computes, at least, of each of its requests.

    Args:
        output: of the step.
        uncertain: draft tokens of the steps before it that may still be rejected, by request.
    """
    cached = output.scheduled_cached_reqs
    found = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    found.update((new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs)
    for name, count in uncertain.items():
        if name in found:
            found[name] = max(found[name] - count, 0)
    return found


class Recovery:
    """Undoes steps whose copies failed, for the requests concerned.

    As vLLM does with KV that a connector could not load (``Scheduler._handle_invalid_blocks``),
    they are computed again from the last good token on. Their results are dropped, and so are
    those of steps in flight behind the failed one. It relies on ``_preempt_request`` with
    ``drop_stale_output``, v1/core/sched/scheduler.py:1571, as ``reset_prefix_cache`` does.

    Attributes:
        failures: steps in which a copy failed.
    """

    def __init__(self, scheduler: Any) -> None:
        """No step is in flight."""
        self._scheduler = scheduler
        manager = scheduler.kv_cache_manager
        self._flight = Flight(manager.residency, manager.block_size)
        self._again: dict[str, tuple[int, int]] = {}  # Times in a row, and tokens known then.
        self._ended: list[Request] = []
        self._quiet_until = 0.0
        self.failures = 0

    def submitted(self, output: SchedulerOutput, uncertain: Mapping[str, int] = NO_DRAFTS) -> None:
        """A step goes to the workers.

        Args:
            output: of the step.
            uncertain: draft tokens of the steps in flight before it, by request.
        """
        self._flight.submitted(output, output.pie.plan, lambda: starts(output, uncertain))

    def landed(self, output: SchedulerOutput, failure: str) -> None:
        """The results of a step are there; before vLLM takes them.

        Args:
            output: that the step was scheduled by.
            failure: what failed of its copies; empty if nothing did.
        """
        if failure:
            self._recover(output, failure)
        self._flight.landed(output)

    def lost(self) -> None:
        """No results of the steps in flight will come: forget all KV, which nobody uses."""
        residency = self._scheduler.kv_cache_manager.residency
        self._flight.clear()
        self._scheduler.kv_cache_manager.drafts.clear()
        residency.parking.copies.restores.clear()  # Of a step whose planning was interrupted.
        self._scheduler.reset_prefix_cache()
        residency.read_set.send_again()

    def report(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Add the ends of requests that are not tried any more to vLLM's outputs."""
        for request in self._ended:
            to = outputs.setdefault(request.client_index, EngineCoreOutputs())
            to.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        self._ended.clear()

    def _recover(self, output: SchedulerOutput, failure: str) -> None:
        self.failures += 1
        scheduler = self._scheduler
        good = self._flight.failed(output)
        found = [scheduler.requests[name] for name in good if name in scheduler.requests]
        order = {request.request_id: place for place, request in enumerate(scheduler.running)}
        # The first one comes first again: each goes to the head of those that wait.
        found.sort(key=lambda request: order.get(request.request_id, -1), reverse=True)
        gone = {request for request in found if request.request_id in order}
        if gone:
            scheduler.running = [r for r in scheduler.running if r not in gone]
        now = time.monotonic()
        ending = []
        for request in found:
            if request in gone:
                self._preempt(request, good[request.request_id], now)
            elif request.num_stale_output_tokens:
                request.drop_stale_output = True  # It was preempted with the step in flight.
            waits_with_blocks = scheduler.kv_cache_manager.residency.tables.get(request.request_id)
            if waits_with_blocks or self._too_often(request):
                ending.append(request.request_id)
        if ending:
            self._ended += scheduler.finish_requests(ending, RequestStatus.FINISHED_ERROR)
        self._log(failure, len(found), ending, now)

    def _preempt(self, request: Request, good: int, now: float) -> None:
        """Have a running request computed again from token ``good`` on."""
        request.num_computed_tokens = min(good, request.num_computed_tokens)
        self._scheduler._preempt_request(request, now, drop_stale_output=True)
        manager = self._scheduler.kv_cache_manager
        if manager.residency.beside:  # Windows and states are those behind the wrong tokens.
            manager.admission.keeping.forget(request.request_id)
        # The workers may get it back in the next step: as if it had not run in this one.
        self._scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    def _too_often(self, request: Request) -> bool:
        name, tokens = request.request_id, request.num_tokens
        times, before = self._again.get(name, (0, -1))
        times = times + 1 if tokens == before else 1
        self._again[name] = times, tokens
        if len(self._again) > 2 * len(self._scheduler.requests) + 64:
            self._again = {n: t for n, t in self._again.items() if n in self._scheduler.requests}
        return times > MOST_IN_A_ROW

    def _log(self, failure: str, found: int, ending: list[str], now: float) -> None:
        if ending:
            logger.error(
                "Pie: ended with an error, because copies of their KV failed %d times in a row, or "
                "because they waited for input with KV that is lost: requests %s. %s",
                MOST_IN_A_ROW,
                ", ".join(ending),
                failure,
            )
        if now >= self._quiet_until:
            self._quiet_until = now + LOG_SECONDS
            logger.warning(
                "Pie: a copy of KV failed, so %d requests are computed again (%d failures so "
                "far): %s",
                found,
                self.failures,
                failure,
            )

"""vLLM's scheduler as the policy's controller sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.candidate import Claims
from pie_vllm.policy.admission.chunk import Asked


class ScheduleView:
    """``SchedulerView`` of the policy over vLLM's scheduler; it holds no state of requests."""

    def __init__(self, scheduler: Any) -> None:
        """Look at this scheduler from now on."""
        self._scheduler = scheduler
        self._all_decode = -1  # The newest step that was seen to be one of decodes alone.

    @property
    def running(self) -> Sequence[Any]:
        """Running requests, in the order in which they are served."""
        found: Sequence[Any] = self._scheduler.running
        return found

    @property
    def requests(self) -> Mapping[str, Any]:
        """All unfinished requests, by id."""
        found: Mapping[str, Any] = self._scheduler.requests
        return found

    @property
    def newcomers(self) -> bool:
        """Whether requests wait that hold no blocks."""
        return bool(self._scheduler.waiting)

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait, those that hold blocks included."""
        return len(self._scheduler.waiting) + len(self._scheduler.kv_holding_waiting)

    @property
    def num_unfinished(self) -> int:
        """Number of requests that may still run without anything else to come."""
        return int(self._scheduler.get_num_unfinished_requests())

    @property
    def running_max(self) -> int:
        """Maximum number of running requests."""
        return int(self._scheduler.max_num_running_reqs)

    @property
    def tokens_max(self) -> int:
        """Maximum number of tokens that a step computes."""
        return int(self._scheduler.max_num_scheduled_tokens)

    def leave_out(self, request_ids: Sequence[str]) -> None:
        """Have these running requests compute nothing in the coming step.

        vLLM counts the step when it schedules it, and runs who is due in it or before.
        """
        scheduler = self._scheduler
        due = scheduler.current_step + 2
        for request_id in request_ids:
            request = scheduler.requests[request_id]
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, due)

    def asked(self) -> Asked:
        """What running requests ask of the coming step, whose number vLLM has not set yet.

        Those whose last token a step in flight samples are skipped as in the loop of ``schedule``,
        v1/core/sched/scheduler.py:667 and :717 in 0.32. There are hundreds of requests a step.
        """
        scheduler = self._scheduler
        step, last = scheduler.current_step + 1, scheduler.max_model_len - 1
        drafts = scheduler.num_spec_tokens > 0
        asked = None if drafts else self._asked_by_decodes(step, last)
        if asked is not None:
            self._all_decode = step
            return asked
        most = self._prompt_tokens_max()
        running = []
        for r in scheduler.running:
            computed, ahead = r.num_computed_tokens, r.num_output_placeholders
            prompt = r.is_prefill_chunk
            out = step < r.next_decode_eligible_step or computed >= last
            if ahead and not out:
                out = computed + 2 - ahead >= r.num_prompt_tokens + r.max_tokens
            left, lacks = min(r.num_tokens - computed, most) if prompt else 1, None
            if drafts and not prompt:
                left, lacks = self._verified(r)
            running.append((computed, left, prompt, out, lacks))
        return Asked.of(running, scheduler.kv_cache_manager.block_size)

    def _verified(self, request: Any) -> tuple[int, int]:
        """Tokens that a step verifies for a request that decodes, and blocks that it lacks for it.

        As counted in ``schedule``, v1/core/sched/scheduler.py:703 and :777 in 0.32.
        """
        scheduler, manager = self._scheduler, self._scheduler.kv_cache_manager
        computed, longest = request.num_computed_tokens, scheduler.max_model_len
        tokens = request.num_tokens_with_spec + request.num_output_placeholders - computed
        tokens = max(min(tokens, longest - computed - scheduler.num_sampled_tokens_per_step), 0)
        slots = min(computed + tokens + scheduler.num_lookahead_tokens, longest)
        held = len(manager.residency.tables[request.request_id])
        return tokens, max(cdiv(slots, manager.block_size) - held, 0)

    def _asked_by_decodes(self, step: int, last: int) -> Asked | None:
        """``asked`` where all running requests decode in the step, else None: in half the time."""
        size, due = self._scheduler.kv_cache_manager.block_size, 0
        for r in self._scheduler.running:
            computed, ahead = r.num_computed_tokens, r.num_output_placeholders
            if (
                r.is_prefill_chunk
                or step < r.next_decode_eligible_step
                or computed >= last
                or (ahead and computed + 2 - ahead >= r.num_prompt_tokens + r.max_tokens)
            ):
                return None
            if not computed % size:
                due += 1
        return Asked(len(self._scheduler.running), due)

    def claims(self) -> Claims:
        """What running requests still need while waiting requests are looked at.

        Nothing where ``asked`` has seen all of them decode in the step.
        """
        scheduler = self._scheduler
        if scheduler.current_step == self._all_decode:
            return Claims()
        step, size = scheduler.current_step, scheduler.kv_cache_manager.block_size
        prompts, tails = False, 0
        for request in scheduler.running:
            prompts |= request.is_prefill_chunk
            if step < request.next_decode_eligible_step:
                if scheduler.num_spec_tokens and not request.is_prefill_chunk:
                    tails += self._verified(request)[1]
                else:
                    tails += request.num_computed_tokens % size == 0
        return Claims(prompts, tails)

    def _prompt_tokens_max(self) -> int:
        """Tokens of one prompt in the coming step, by ``--long-prefill-token-threshold``.

        As in ``schedule``, v1/core/sched/scheduler.py:645-657 in 0.32.
        """
        scheduler = self._scheduler
        config, requests = scheduler.scheduler_config, int(sum(scheduler.get_request_counts()))
        threshold: int = config.long_prefill_token_threshold
        if threshold <= 0 or requests <= 1:
            return int(scheduler.max_model_len)
        if scheduler.adaptive_long_prefill_threshold:
            threshold = max(threshold, config.max_num_batched_tokens // requests)
        return int(threshold)

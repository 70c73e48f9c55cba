"""vLLM's schedulers with a step plan attached to each scheduler output."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from time import monotonic
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from pie_vllm.engine.host_memory import available_host_bytes
from pie_vllm.geometry import cdiv
from pie_vllm.plan import StepPlan
from pie_vllm.policy.admission.chunk import Asked, Chunk, decide_chunk, plenty
from pie_vllm.policy.admission.waits import HeadWaits
from pie_vllm.policy.control.decider import Decider, Decision
from pie_vllm.policy.control.detector import Observation
from pie_vllm.policy.control.elastic_pool import ElasticPool
from pie_vllm.policy.control.stall_samples import AwaitedStalls, speed_of_finished
from pie_vllm.policy.control.turns import Turns
from pie_vllm.policy.placement.promotion import tail_room
from pie_vllm.policy.placement.store_ahead import Ahead
from pie_vllm.vllm import settings
from pie_vllm.vllm.compat import engine_core, loggers
from pie_vllm.vllm.scheduler_side.manager import Claims, PieBlockSpaceManager
from pie_vllm.vllm.scheduler_side.metrics import Control, Report, StepLog, Totals
from pie_vllm.vllm.scheduler_side.recovery import Recovery
from pie_vllm.vllm.whole import whole_of

logger = init_logger("vllm.pie")

_Mixed: Any = object  # What the mixin extends; vLLM's own classes are read as Any.


class PieSchedulerMixin(_Mixed):
    """Attaches ``pie_plan`` (StepPlan or None) to every scheduler output."""

    kv_cache_manager: PieBlockSpaceManager
    max_num_scheduled_tokens: int

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        given = settings.of(vllm_config)
        config, geometry = given.config, given.geometry
        if geometry is None:
            raise RuntimeError("the workers' geometry did not reach the scheduler")
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        factory = partial(PieBlockSpaceManager, geometry=geometry, parking=config.parking)
        with engine_core.own_block_manager(factory):
            super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        self._whole = whole_of(vllm_config)
        if self._whole is not None:
            # What is under way gets as much again in the next step.
            self.kv_cache_manager.prompt_reserve = self._whole.blocks(block_size)
        self.kv_cache_manager.claims = self._claims
        self.pie_stale = self.kv_cache_manager.stale
        self.pie_stale.requests = self.requests
        self.pie_decider = Decider(
            geometry.row_bytes,
            geometry.pooled_blocks,
            config.target_slowdown,
            given.prior,
            block_size,
        )
        # A step may compute more where residents are free: then it demotes less.
        self._step_blocks = min(
            cdiv(self.max_num_scheduled_tokens, block_size), geometry.resident_blocks // 2
        )
        self.pie_pool = ElasticPool(
            geometry,
            cdiv(vllm_config.model_config.max_model_len, block_size) + 1 - geometry.resident_blocks,
            available_host_bytes,
            monotonic,
            config.pool_idle_seconds,
            step_blocks=self._step_blocks,
            ranks=vllm_config.parallel_config.tensor_parallel_size,
        )
        self.pie_turns = Turns()
        self._stalls = AwaitedStalls()
        self._prompts_under_way = False
        self._adapters: tuple[tuple[int, int], set[int]] = (-1, -1), set()
        self.pie_decision = self.pie_decider.decide()
        by_priority = vllm_config.scheduler_config.policy == "priority"
        self._priority = (lambda name: self.requests[name].priority) if by_priority else None
        self.pie_waits = HeadWaits()
        self.pie_log = StepLog(
            self.kv_cache_manager.residency, self.pie_decider.detector, self.pie_waits
        )
        self.pie_report = Report(geometry)
        self.pie_recovery = Recovery(self)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, then plan what the step stores, loads and relabels."""
        manager, turns = self.kv_cache_manager, self.pie_turns
        prompts = self._prompt_tokens() if self._prompts_under_way else 0
        most = len(self.running) + prompts // manager.block_size
        if self._begin_pool(most):
            return self._schedule_nothing(*args, **kwargs)
        decision = self.pie_decision = self.pie_decider.decide(prompts)
        manager.begin_step(decision, most)
        residency = manager.residency
        residency.parking.allowance = decision.park_blocks_max
        restored = residency.parking.restored_blocks
        for request_id in turns.begin_step(self.running, residency, decision, self._priority):
            # vLLM counts the step when it schedules it, and runs who is due in it or before.
            request, due = self.requests[request_id], self.current_step + 2
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, due)
        output = self._schedule(decision, *args, **kwargs)
        if self.pie_stale.reloads:
            self.pie_stale.scheduled()
        output.pie_plan = self._plan(output, decision)
        self._end_step(output, restored)
        turns.end_step(output.num_scheduled_tokens, residency)
        return output

    def _end_step(self, output: SchedulerOutput, restored: int) -> None:
        residency, queue = self.kv_cache_manager.residency, self.kv_cache_manager.residency.queue
        in_use, ran = bool(residency.reading.by_request), bool(output.num_scheduled_tokens)
        output.pie_pool = self.pie_pool.end_step(
            residency.rows.chunks_held,
            changed=bool(output.pie_plan and output.pie_plan.stores),
            idle=not (ran or in_use or self.get_num_unfinished_requests()),
            short=queue.free_residents < 2 * self._step_blocks + len(self.running),
        )
        output.pie_restored = residency.parking.restored_blocks != restored
        output.pie_within_budget = not self.pie_turns.exceeds
        output.pie_blocks = residency.residents_in_use + residency.reading.num_blocks
        self.pie_recovery.submitted(output)

    def _begin_pool(self, most: int) -> bool:
        """Use the rows that are there; whether the step waits for others, or to hear of them.

        Args:
            most: blocks that the running requests may take in this step.
        """
        manager, pool = self.kv_cache_manager, self.pie_pool
        residency, queue = manager.residency, manager.residency.queue
        if pool.begin_step(residency.rows.chunks_held):
            self.pie_forget_idle()
        now = pool.usable, pool.expected
        if not pool.asking and now != (residency.chunks_usable, residency.chunks_expected):
            residency.use_chunks(*now)
        if self.waiting:
            most += self._step_blocks + 1
        short = queue.withheld > queue.missing and queue.num_free_blocks < most
        return pool.paused(short and not queue.frozen and queue.available_pooled < queue.demotable)

    def _schedule_nothing(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """An empty step, which brings back what the pool holds."""
        prompts = self._prompts_under_way
        output = self._schedule_at_most(0, *args, **kwargs)
        if self._waiting and self.pause_state == PauseState.UNPAUSED:
            self.pie_waits.count("rows")
        output.pie_plan = self._plan(output, self.pie_decision)
        self._prompts_under_way = prompts
        self._end_step(output, self.kv_cache_manager.residency.parking.restored_blocks)
        return output

    def add_request(self, request: Any) -> None:
        """Take a request as vLLM does; KV of its adapter before a reload is none of its."""
        self.pie_stale.arrives(request)
        super().add_request(request)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """As vLLM's: whether a waiting request may go on, or is passed over in this step.

        It is passed over, too, while its adapter would be one too many among the running requests.
        0.32 counts the adapters of those that run in the step, v1/core/sched/scheduler.py:892, and
        asserts a step later that those left out of it fit, too.
        """
        ready = bool(super()._handle_blocked_waiting_request(request))
        return ready and (self.lora_config is None or self._adapter_fits(request))

    def _adapter_fits(self, request: Any) -> bool:
        if request.lora_request is None:
            return True
        key = self.current_step, len(self.running)  # While requests wait, others only join.
        if self._adapters[0] != key:
            adapters = {r.lora_request.lora_int_id for r in self.running if r.lora_request}
            self._adapters = key, adapters
        adapters = self._adapters[1]
        fits = len(adapters) < self.lora_config.max_loras
        return fits or request.lora_request.lora_int_id in adapters

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """As vLLM's; the tail of a session preempted meanwhile has other tokens than it goes on."""
        self.kv_cache_manager.residency.parking.tails.drop(session.request_id)
        super()._update_request_as_session(session, update)

    def _prompt_tokens(self) -> int:
        """Prompt tokens that running requests will compute in the coming step, about."""
        left = sum(r.num_tokens - r.num_computed_tokens for r in self.running if r.is_prefill_chunk)
        room = self.kv_cache_manager.residency.queue.num_free_blocks
        return int(
            min(left, self.max_num_scheduled_tokens, room * self.kv_cache_manager.block_size)
        )

    def _schedule(self, decision: Decision, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, with as many tokens as find resident pages."""
        chunk = self._chunk(decision, self.max_num_scheduled_tokens)
        self.kv_cache_manager.chunk_blocks = chunk.blocks
        output = self._schedule_at_most(chunk.tokens, *args, **kwargs)
        self._count_wait(output, chunk.tokens)
        return output

    def _schedule_at_most(self, tokens: int, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, with so many tokens at most.

        vLLM reads ``max_num_scheduled_tokens`` once a step: v1/core/sched/scheduler.py:611 in 0.32,
        :719 in 0.33, and :1405, :1620 where it checks the result.
        """
        most = self.max_num_scheduled_tokens
        self.max_num_scheduled_tokens = tokens
        try:
            output: SchedulerOutput = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = most
        return output

    def _chunk(self, decision: Decision, most: int) -> Chunk:
        """How many tokens the coming step computes, of so many at most."""
        manager, queue = self.kv_cache_manager, self.kv_cache_manager.residency.queue
        size = manager.block_size
        waiting = bool(self._waiting)
        asks = waiting or self._prompts_under_way
        if not asks or self._whole is not None or plenty(queue, most, len(self.running), size):
            return Chunk(most, cdiv(most, size))
        manager.completions.catch_up()
        return decide_chunk(
            queue, self._running_ask(), waiting, decision.prompt_demotion_max, most, size
        )

    @property
    def _waiting(self) -> int:
        """Requests that wait."""
        return len(self.waiting) + len(self.kv_holding_waiting)

    def _count_wait(self, output: SchedulerOutput, allowed: int) -> None:
        """Note why the head of the waiting queue was passed over, if one waits.

        Args:
            output: of the step.
            allowed: tokens that it was allowed.
        """
        waiting = self._waiting
        if not waiting or self.pause_state != PauseState.UNPAUSED:
            return
        if self.kv_cache_manager.refused:
            reason = self.kv_cache_manager.refused
        elif len(self.deferred_waiting) >= waiting:
            reason = "deferred"
        elif len(self.running) + self.num_waiting_for_streaming_input >= self.max_num_active_reqs:
            reason = "seqs"
        elif output.total_num_scheduled_tokens == allowed or not output.preempted_req_ids:
            reason = "residents" if allowed < self.max_num_scheduled_tokens else "tokens"
        else:
            reason = "preemption"
        self.pie_waits.count(reason)

    def _running_ask(self) -> Asked:
        """What running requests ask of the coming step, whose number vLLM has not set yet.

        Those whose last token a step in flight samples are skipped as in the loop of ``schedule``,
        v1/core/sched/scheduler.py:667 and :717 in 0.32. There are hundreds of requests a step.
        """
        step, most, last = self.current_step + 1, self._prompt_tokens_max(), self.max_model_len - 1
        running = []
        for r in self.running:
            computed, ahead = r.num_computed_tokens, r.num_output_placeholders
            prompt = r.is_prefill_chunk
            out = step < r.next_decode_eligible_step or computed >= last
            if ahead and not out:
                out = computed + 2 - ahead >= r.num_prompt_tokens + r.max_tokens
            left = min(r.num_tokens - computed, most) if prompt else 1
            running.append((computed, left, prompt, out))
        return Asked.of(running, self.kv_cache_manager.block_size)

    def _prompt_tokens_max(self) -> int:
        """Tokens of one prompt in the coming step, by ``--long-prefill-token-threshold``.

        As in ``schedule``, v1/core/sched/scheduler.py:645-657 in 0.32.
        """
        config, requests = self.scheduler_config, int(sum(self.get_request_counts()))
        threshold: int = config.long_prefill_token_threshold
        if threshold <= 0 or requests <= 1:
            return int(self.max_model_len)
        if self.adaptive_long_prefill_threshold:
            threshold = max(threshold, config.max_num_batched_tokens // requests)
        return int(threshold)

    def _claims(self) -> Claims:
        step, block_size = self.current_step, self.kv_cache_manager.block_size
        prompts = any(request.is_prefill_chunk for request in self.running)
        tails = [
            request
            for request in self.running
            if step < request.next_decode_eligible_step
            and request.num_computed_tokens % block_size == 0
        ]
        return Claims(prompts, len(tails))

    def _plan(self, output: SchedulerOutput, decision: Decision) -> StepPlan | None:
        manager = self.kv_cache_manager
        residency = manager.residency
        scheduled = output.num_scheduled_tokens
        tokens = output.total_num_scheduled_tokens
        fresh: Collection[str] = output.scheduled_cached_reqs.resumed_req_ids
        if output.scheduled_new_reqs:
            fresh = {*fresh, *(r.req_id for r in output.scheduled_new_reqs)}
        several: Collection[str] = ()
        prompts = tokens > len(scheduled) or bool(fresh)
        if prompts:
            several = [r for r, count in scheduled.items() if count > 1 and r not in fresh]
        # One that is left out of the step has prompt tokens left all the same.
        self._prompts_under_way = prompts or (
            self._prompts_under_way and any(r.is_prefill_chunk for r in self.running)
        )
        manager.completions.next_step(self.requests, several, fresh)
        headroom = None
        if residency.reading.by_request and (
            not self.waiting
            or len(self.running) >= self.max_num_running_reqs
            or residency.pooled_in_use > decision.pooled_admission_max
        ):
            headroom = tail_room(len(self.running), manager.block_size)
        running = len(self.running)
        ahead = Ahead.of(decision, self.pie_turns.taken, running, manager.chunk_blocks, prompts)
        return residency.end_step(
            scheduled, fresh, tokens > 0, headroom, decision.load_blocks_max, ahead
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """Take vLLM's results, and the engine's counters that came with them."""
        if not hasattr(scheduler_output, "pie_plan"):  # It was not scheduled here.
            return super().update_from_output(scheduler_output, model_runner_output)
        stats = getattr(model_runner_output, "pie_stats", None)
        failure = getattr(model_runner_output, "pie_failure", "")
        if stats is not None:
            if not failure:
                self._observe(scheduler_output, stats, model_runner_output.pie_seconds)
            self.pie_log.record(stats)
        state = getattr(model_runner_output, "pie_pool", None)
        if state is None:
            self.pie_pool.unanswered(scheduler_output.pie_pool)
        else:
            self.pie_pool.report(state)
        self.pie_recovery.landed(scheduler_output, failure)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.pie_recovery.report(outputs)
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Finish requests as vLLM does.

        All at once is what ``--enable-fault-tolerance`` does after an error in a step, before it
        goes on (v1/fault_tolerance/engine_core_sentinel.py:87): KV of steps in flight is not to be
        trusted then.
        """
        finished = super().finish_requests(request_ids, finished_status)
        if request_ids is None and self.parallel_config.enable_fault_tolerance:
            self.pie_recovery.lost()
        return finished

    def _observe(self, output: Any, totals: Totals, seconds: float) -> None:
        before, plan = self.pie_log.totals, output.pie_plan
        loaded = totals.bytes_loaded - before.bytes_loaded
        busy = totals.load_seconds - before.load_seconds
        if busy > 0:
            finished = totals.bytes_finished - before.bytes_finished
            busy = speed_of_finished(loaded, finished, busy)
        tokens, requests = output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)
        blocks, restored = output.pie_blocks, output.pie_restored
        seen = Observation(tokens, requests, seconds, 0.0, loaded, busy, blocks, restored)
        if totals.graph_steps != before.graph_steps:
            # Nothing in a graph is timed: what its loads cost shows in the time of the step.
            self.pie_decider.observe(seen, within_budget=False)
        elif plan is None or not plan.forward:
            self.pie_decider.observe(seen, within_budget=output.pie_within_budget)
        else:
            self._stalls.add(plan.step, seen, output.pie_within_budget)
            for late in self._stalls.overdue():
                self.pie_decider.observe(late, within_budget=False)
        if totals.stall_step != before.stall_step:
            for known, within in self._stalls.take(totals.stall_step, totals.step_stall):
                self.pie_decider.observe(known, within_budget=within)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Make vLLM's statistics of a step, with pie's among them."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            control = Control(
                self.pie_decision.pooled_admission_max,
                self.pie_decision.load_blocks_max,
                int(self.pie_decider.detector.bandwidth or 0),
                self.pie_turns.left_out,
                self.pie_pool.state.chunks,
                self.pie_decider.detector.streaming_seconds,
                self.pie_decider.detector.slowed_seconds,
                self.kv_cache_manager.admissions.recomputed_tokens,
                self.kv_cache_manager.admissions.hits,
                self.pie_waits.steps,
                self.pie_recovery.failures,
            )
            residency = self.kv_cache_manager.residency
            changes = self.pie_report.changes(self.pie_log.totals, residency, control)
            loggers.carry(stats).update(changes)
        return stats

    def pie_forget_idle(self) -> None:
        """Drop all KV in the pool that no request uses; what residents cache is vLLM's."""
        self.kv_cache_manager.residency.forget_idle()

    def shutdown(self) -> None:
        """Shut down as vLLM does, and log the totals."""
        self.pie_log.write()
        super().shutdown()


class PieScheduler(PieSchedulerMixin, Scheduler):
    """vLLM's scheduler, one step in flight."""


class PieAsyncScheduler(PieSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler, two steps in flight."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The flavour that ``vllm_config`` asks for; vLLM calls it as a scheduler class."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    flavour = PieAsyncScheduler if asynchronous else PieScheduler
    return flavour(vllm_config=vllm_config, **kwargs)

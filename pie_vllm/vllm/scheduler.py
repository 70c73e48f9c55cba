"""vLLM's schedulers with a step plan attached to each scheduler output."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from time import monotonic
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from pie_vllm.memory.host import available_host_bytes
from pie_vllm.policy.decider import Decider, Decision
from pie_vllm.policy.detector import Observation
from pie_vllm.policy.elastic import ElasticPool
from pie_vllm.policy.geometry import cdiv, chunk_blocks_of
from pie_vllm.policy.plan import StepPlan
from pie_vllm.policy.promotion import tail_room
from pie_vllm.policy.rotation import Turns
from pie_vllm.policy.stalls import AwaitedStalls, speed_of_finished
from pie_vllm.policy.write_through import Ahead
from pie_vllm.vllm import compat, settings
from pie_vllm.vllm.manager import Claims, PieBlockSpaceManager
from pie_vllm.vllm.metrics import Control, Report, StepLog, Totals
from pie_vllm.vllm.recovery import Recovery

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
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        chunk_blocks = chunk_blocks_of(budget, block_size, geometry)
        factory = partial(
            PieBlockSpaceManager,
            geometry=geometry,
            chunk_blocks=chunk_blocks,
            parking=config.parking,
        )
        with compat.own_block_manager(factory):
            super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        most = chunk_blocks * block_size
        if most < self.max_num_scheduled_tokens:
            logger.info(
                "Pie: at most %d tokens a step (of --max-num-batched-tokens %d): %d resident "
                "blocks hold no more while they are written.",
                most,
                self.max_num_scheduled_tokens,
                geometry.resident_blocks,
            )
            self.max_num_scheduled_tokens = most
        self.kv_cache_manager.claims = self._claims
        self.pie_decider = Decider(
            geometry.row_bytes,
            geometry.pooled_blocks,
            config.target_slowdown,
            given.prior,
            block_size,
        )
        self.pie_pool = ElasticPool(
            geometry,
            cdiv(vllm_config.model_config.max_model_len, block_size) + 1 - geometry.resident_blocks,
            available_host_bytes,
            monotonic,
            config.pool_idle_seconds,
        )
        self.pie_turns = Turns()
        self._stalls = AwaitedStalls()
        self._prompts_under_way = False
        self.pie_decision = self.pie_decider.decide()
        by_priority = vllm_config.scheduler_config.policy == "priority"
        self._priority = (lambda name: self.requests[name].priority) if by_priority else None
        self.pie_log = StepLog(self.kv_cache_manager.residency, self.pie_decider.detector)
        self.pie_report = Report(geometry)
        self.pie_recovery = Recovery(self)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, then plan what the step stores, loads and relabels."""
        manager, turns = self.kv_cache_manager, self.pie_turns
        prompts = self._prompt_tokens() if self._prompts_under_way else 0
        decision = self.pie_decision = self.pie_decider.decide(prompts)
        most = len(self.running) + prompts // manager.block_size
        manager.begin_step(decision, most)
        residency, pool = manager.residency, self.pie_pool
        residency.parking.allowance = decision.parks
        restored = residency.parking.restored_blocks
        if pool.begin_step():
            self.pie_forget_idle()
        if pool.usable != residency.chunks_usable:
            residency.use_chunks(pool.usable)
        for request_id in turns.begin_step(self.running, residency, decision, self._priority):
            # vLLM counts the step when it schedules it, and runs who is due in it or before.
            self.requests[request_id].next_decode_eligible_step = self.current_step + 2
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        plan = output.pie_plan = self._plan(output, decision)
        output.pie_pool = pool.end_step(
            residency.rows.chunks_held,
            in_use=bool(residency.reading.by_request),
            changed=bool(plan and plan.stores) or not output.num_scheduled_tokens,
        )
        output.pie_restored = residency.parking.restored_blocks != restored
        output.pie_within_budget = not turns.exceeds
        output.pie_blocks = residency.residents_in_use + residency.reading.num_blocks
        turns.end_step(output.num_scheduled_tokens, residency)
        self.pie_recovery.submitted(output)
        return output

    def _prompt_tokens(self) -> int:
        """Prompt tokens that running requests will compute in the coming step, about."""
        left = sum(r.num_tokens - r.num_computed_tokens for r in self.running if r.is_prefill_chunk)
        return int(min(left, self.max_num_scheduled_tokens))

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
        self._prompts_under_way = tokens > len(scheduled) or bool(fresh)
        if self._prompts_under_way:
            several = [r for r, count in scheduled.items() if count > 1 and r not in fresh]
        manager.completions.next_step(self.requests, several, fresh)
        headroom = None
        if residency.reading.by_request and (
            not self.waiting
            or len(self.running) >= self.max_num_running_reqs
            or residency.pooled_in_use > decision.limit
        ):
            headroom = tail_room(len(self.running), manager.block_size)
        running, prompts = len(self.running), self._prompts_under_way
        ahead = Ahead.of(decision, self.pie_turns.taken, running, manager.chunk_blocks, prompts)
        return residency.end_step(scheduled, fresh, tokens > 0, headroom, decision.budget, ahead)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """Take vLLM's results, and the engine's counters that came with them."""
        stats = getattr(model_runner_output, "pie_stats", None)
        failure = getattr(model_runner_output, "pie_failure", "")
        if stats is not None:
            if not failure:
                self._observe(scheduler_output, stats, model_runner_output.pie_seconds)
            self.pie_pool.report(model_runner_output.pie_pool)
            self.pie_log.record(stats)
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
                self.pie_decision.limit,
                self.pie_decision.budget,
                int(self.pie_decider.detector.bandwidth or 0),
                self.pie_turns.left_out,
                self.pie_pool.state.chunks,
                self.pie_decider.detector.streaming_seconds,
                self.pie_decider.detector.slowed_seconds,
                self.kv_cache_manager.admissions.recomputed_tokens,
                self.kv_cache_manager.admissions.hits,
                self.pie_recovery.failures,
            )
            residency = self.kv_cache_manager.residency
            changes = self.pie_report.changes(self.pie_log.totals, residency, control)
            compat.carry(stats).update(changes)
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

"""vLLM's schedulers with a step plan attached to each scheduler output."""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from pie_vllm.policy.plan import StepPlan
from pie_vllm.vllm import compat, settings
from pie_vllm.vllm.manager import Claims, PieBlockSpaceManager, chunk_blocks_of
from pie_vllm.vllm.metrics import Report, StepLog

logger = init_logger("vllm.pie")


_Mixed: Any = object  # What the mixin extends; vLLM's own classes are read as Any.


class PieSchedulerMixin(_Mixed):
    """Attaches ``pie_plan`` (StepPlan or None) to every scheduler output."""

    kv_cache_manager: PieBlockSpaceManager
    max_num_scheduled_tokens: int

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        geometry = settings.of(vllm_config).geometry
        if geometry is None:
            raise RuntimeError("the workers' geometry did not reach the scheduler")
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        chunk_blocks = chunk_blocks_of(budget, block_size, geometry)
        factory = partial(PieBlockSpaceManager, geometry=geometry, chunk_blocks=chunk_blocks)
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
        self.pie_log = StepLog(geometry)
        self.pie_report = Report(geometry)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, then plan what the step stores, loads and relabels."""
        self.kv_cache_manager.begin_step()
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        output.pie_plan = self._plan(output)
        return output

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

    def _plan(self, output: SchedulerOutput) -> StepPlan | None:
        manager = self.kv_cache_manager
        residency = manager.residency
        scheduled = output.num_scheduled_tokens
        fresh = {r.req_id for r in output.scheduled_new_reqs}
        fresh.update(output.scheduled_cached_reqs.resumed_req_ids)
        several: list[str] = []
        if output.total_num_scheduled_tokens > len(scheduled):
            several = [r for r, tokens in scheduled.items() if tokens > 1 and r not in fresh]
        manager.completions.next_step(self.requests, several, fresh)
        running = len(self.running)
        headroom = None
        if not self.waiting or running >= self.max_num_running_reqs:
            headroom = running // manager.block_size + 2
        return residency.end_step(scheduled, fresh, output.total_num_scheduled_tokens > 0, headroom)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """Take vLLM's results, and the engine's counters that came with them."""
        stats = getattr(model_runner_output, "pie_stats", None)
        if stats is not None:
            self.pie_log.record(stats, self.kv_cache_manager.residency.pooled_in_use)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Make vLLM's statistics of a step, with pie's among them."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            residency = self.kv_cache_manager.residency
            changes = self.pie_report.changes(self.pie_log.totals, residency)
            compat.carry(stats).update(changes)
        return stats

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

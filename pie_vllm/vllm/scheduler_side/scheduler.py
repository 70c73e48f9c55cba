"""vLLM's schedulers with pie's orders attached to each scheduler output."""

from __future__ import annotations

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
from pie_vllm.plan import StepReport
from pie_vllm.policy.admission.waits import HeadWaits
from pie_vllm.policy.control.decider import Decider
from pie_vllm.policy.control.elastic_pool import ElasticPool
from pie_vllm.policy.controller import Controller
from pie_vllm.vllm import settings
from pie_vllm.vllm.compat import engine_core, loggers
from pie_vllm.vllm.kv_groups import groups_of
from pie_vllm.vllm.scheduler_side.manager import PieBlockSpaceManager
from pie_vllm.vllm.scheduler_side.metrics import Control, Report, StepLog
from pie_vllm.vllm.scheduler_side.recovery import Recovery
from pie_vllm.vllm.scheduler_side.schedule_view import ScheduleView
from pie_vllm.vllm.speculation import speculation_of, takes_turns
from pie_vllm.vllm.whole import whole_of

logger = init_logger("vllm.pie")

_Mixed: Any = object  # What the mixin extends; vLLM's own classes are read as Any.


class PieSchedulerMixin(_Mixed):
    """Attaches ``pie`` (StepOrders) to every scheduler output.

    Attributes:
        pie_controller: Policy around each step.
        pie_waits: Steps in which the head of the waiting queue was passed over, by reason.
        pie_recovery: Undoes steps whose copies failed.
        pie_stale: Keeps KV of old weights out of prefix cache and pool.
        pie_log: Log line of totals.
        pie_report: Counters that the front end has not been told yet.
    """

    kv_cache_manager: PieBlockSpaceManager
    max_num_scheduled_tokens: int

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        given = settings.of(vllm_config)
        geometry = given.geometry
        if geometry is None:
            raise RuntimeError("the workers' geometry did not reach the scheduler")
        groups = groups_of(kv_cache_config.kv_cache_groups, None, vllm_config)
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        # Where vLLM computes prompts as a whole, the model may be unable to go on behind KV.
        goes_on = cache.enable_prefix_caching or scheduler.enable_chunked_prefill
        factory = partial(
            PieBlockSpaceManager,
            geometry=geometry,
            groups=groups,
            parking=given.config.parking if goes_on else None,
            speculation=speculation_of(vllm_config),
        )
        with engine_core.own_block_manager(factory):
            super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        manager = self.kv_cache_manager
        whole = whole_of(vllm_config)
        manager.admission.room.prompt_reserve *= groups.cost
        if whole is not None:
            # What is under way gets as much again in the next step.
            manager.admission.room.prompt_reserve = groups.cost * whole.blocks(manager.block_size)
        self.pie_stale = manager.stale
        self.pie_stale.requests = self.requests
        self._view = ScheduleView(self)
        self.pie_controller = self._make_controller(vllm_config, splits=whole is None)
        self._adapters: tuple[tuple[int, int], set[int]] = (-1, -1), set()
        self.pie_waits = HeadWaits()
        detector = self.pie_controller.decider.detector
        self.pie_log = StepLog(manager.residency, detector, self.pie_waits)
        self.pie_report = Report(geometry)
        self.pie_recovery = Recovery(self)
        logger.info("Pie: what is parked in CPU memory is %s", _parked(manager))

    def _make_controller(self, vllm_config: Any, *, splits: bool) -> Controller:
        """The policy around each step, with a pool that grows and shrinks."""
        given = settings.of(vllm_config)
        config, manager = given.config, self.kv_cache_manager
        geometry, block_size = manager.geometry, manager.block_size
        decider = Decider(
            geometry.load_bytes,
            geometry.pooled_blocks,
            config.target_slowdown,
            given.prior,
            block_size,
        )
        by_priority = vllm_config.scheduler_config.policy == "priority"
        controller = Controller(
            self._view,
            manager.residency,
            manager.admission,
            decider,
            block_size,
            priority=(lambda name: self.requests[name].priority) if by_priority else None,
            splits=splits,
            cost=manager.groups.cost,
            speculation=speculation_of(vllm_config),
            drafts=manager.drafts,
            turns=takes_turns(vllm_config, self.has_mamba_layers),
        )
        longest = cdiv(vllm_config.model_config.max_model_len, block_size)
        longest += sum(manager.groups.residents_min)
        controller.pool = ElasticPool(
            geometry,
            longest + 1 - geometry.resident_blocks,
            available_host_bytes,
            monotonic,
            config.pool_idle_seconds,
            step_blocks=manager.groups.cost * controller.step_blocks,
            ranks=vllm_config.parallel_config.tensor_parallel_size,
            first_chunks=settings.first_chunks(vllm_config, geometry, block_size),
        )
        return controller

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, between the controller's beginning and end of the step."""
        terms = self.pie_controller.begin_step()
        output = self._schedule_at_most(terms.tokens, *args, **kwargs)
        if self.pause_state == PauseState.UNPAUSED and self._view.num_waiting:
            self.pie_waits.count(
                "rows" if terms.paused else self._passed_over(output, terms.tokens)
            )
        if self.pie_stale.reloads and not terms.paused:
            self.pie_stale.scheduled()
        fresh = output.scheduled_cached_reqs.resumed_req_ids
        if output.scheduled_new_reqs:
            fresh = {*fresh, *(r.req_id for r in output.scheduled_new_reqs)}
        drafts, uncertain = 0, {}
        if self.num_spec_tokens:
            known = self.kv_cache_manager.drafts
            uncertain = known.by_request
            drafts = known.submitted(output, output.scheduled_spec_decode_tokens)
        output.pie = self.pie_controller.end_step(
            output.num_scheduled_tokens, output.total_num_scheduled_tokens, fresh, drafts
        )
        if output.new_block_ids_to_zero:
            self._keep_filled(output)
        self.pie_recovery.submitted(output, uncertain)
        return output

    def _keep_filled(self, output: SchedulerOutput) -> None:
        """Have the workers zero no block that the step fills with KV of the pool."""
        plan = output.pie.plan
        if plan is not None and len(plan.promotions):
            filled = {
                block
                for first, _, count in plan.promotions.tolist()
                for block in range(first, first + count)
            }
            ids = [block for block in output.new_block_ids_to_zero if block not in filled]
            output.new_block_ids_to_zero = ids or None

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

    def _passed_over(self, output: SchedulerOutput, allowed: int) -> str:
        """Why the head of the waiting queue was passed over.

        Args:
            output: of the step.
            allowed: tokens that it was allowed.
        """
        if self.kv_cache_manager.admission.refused:
            return self.kv_cache_manager.admission.refused
        if len(self.deferred_waiting) >= self._view.num_waiting:
            return "deferred"
        if len(self.running) + self.num_waiting_for_streaming_input >= self.max_num_active_reqs:
            return "seqs"
        if output.total_num_scheduled_tokens == allowed or not output.preempted_req_ids:
            return "residents" if allowed < self.max_num_scheduled_tokens else "tokens"
        return "preemption"

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
        """As vLLM's; what is kept of a session preempted meanwhile has other tokens."""
        self.kv_cache_manager.admission.keeping.forget(session.request_id)
        super()._update_request_as_session(session, update)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        """Take vLLM's results, and the workers' report that came with them."""
        if not hasattr(scheduler_output, "pie"):  # It was not scheduled here.
            return super().update_from_output(scheduler_output, model_runner_output)
        report: StepReport | None = getattr(model_runner_output, "pie", None)
        drafts = self.kv_cache_manager.drafts
        self.pie_controller.observe(
            scheduler_output.pie,
            report,
            scheduler_output.total_num_scheduled_tokens,
            len(scheduler_output.num_scheduled_tokens),
            drafts.of_step(scheduler_output) if self.num_spec_tokens else 0,
        )
        if report is not None:
            self.pie_log.record(report.totals)
        self.pie_recovery.landed(scheduler_output, report.failure if report else "")
        if self.num_spec_tokens:  # vLLM takes back the rejected ones of each request next.
            drafts.landed(scheduler_output)
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

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Make vLLM's statistics of a step, with pie's among them where they are due."""
        stats = super().make_stats(*args, **kwargs)
        goes_on = self.running and self.pause_state == PauseState.UNPAUSED
        if stats is not None and self.pie_report.due(last=not goes_on):
            manager, controller = self.kv_cache_manager, self.pie_controller
            decision, detector = controller.decision, controller.decider.detector
            control = Control(
                decision.pooled_admission_max,
                decision.load_blocks_max,
                int(detector.bandwidth or 0),
                controller.turns.left_out,
                controller.chunks_held,
                detector.streaming_seconds,
                detector.slowed_seconds,
                manager.hit_counts.recomputed_tokens,
                manager.hit_counts.hits,
                self.pie_waits.steps,
                self.pie_recovery.failures,
            )
            residency = manager.residency
            changes = self.pie_report.changes(self.pie_log.totals, residency, control)
            loggers.carry(stats).update(changes)
        return stats

    def shutdown(self) -> None:
        """Shut down as vLLM does, and log the totals."""
        self.pie_log.write()
        super().shutdown()


def _parked(manager: PieBlockSpaceManager) -> str:
    """What the pool keeps for those that do not run, for the log."""
    if not manager.residency.parking.enabled:
        return "nothing"
    if manager.by_request or not manager.enable_caching:
        return "KV of preempted requests"
    return f"KV of {'whole chats' if manager.groups.others else 'prefixes'} and preemptions"


class PieScheduler(PieSchedulerMixin, Scheduler):
    """vLLM's scheduler, one step in flight."""


class PieAsyncScheduler(PieSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler, two steps in flight."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The flavour that ``vllm_config`` asks for; vLLM calls it as a scheduler class."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    flavour = PieAsyncScheduler if asynchronous else PieScheduler
    return flavour(vllm_config=vllm_config, **kwargs)

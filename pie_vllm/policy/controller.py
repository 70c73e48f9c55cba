"""The front door of the policy: what happens around each step of a scheduler.

A step is ``begin_step``, the scheduler's own choice of who runs, in which it asks ``admission`` for
each waiting request, and ``end_step``, which returns what the workers are to do. ``observe`` takes
what became of it, when that is known. vLLM's scheduler and the simulator's both call nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pie_vllm.geometry import cdiv
from pie_vllm.plan import PoolOrder, StepOrders, StepPlan, StepReport, Totals
from pie_vllm.policy.admission.candidate import Claims
from pie_vllm.policy.admission.chunk import Asked, Chunk, decide_chunk, plenty
from pie_vllm.policy.admission.transaction import Admission
from pie_vllm.policy.control.decider import Decides, Decision
from pie_vllm.policy.control.detector import Observation
from pie_vllm.policy.control.elastic_pool import ElasticPool
from pie_vllm.policy.control.stall_samples import AwaitedStalls, speed_of_finished
from pie_vllm.policy.control.turns import Turns
from pie_vllm.policy.placement.completed_blocks import CompletedBlocks
from pie_vllm.policy.placement.headroom import demoted_at_once, tail_room
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.policy.placement.store_ahead import Ahead
from pie_vllm.policy.speculation import NO_SPECULATION, DraftsInFlight, Speculation


class SchedulerView(Protocol):
    """What the controller asks of the scheduler around it.

    Requests have the attributes ``request_id``, ``num_tokens``, ``num_computed_tokens`` (counted
    as computed when they are scheduled) and ``is_prefill_chunk`` (whether the newest step left
    tokens of a prompt to compute), as vLLM's do.
    """

    @property
    def running(self) -> Sequence[Any]:
        """Running requests, in the order in which they are served."""

    @property
    def requests(self) -> Mapping[str, Any]:
        """All unfinished requests, by id."""

    @property
    def newcomers(self) -> bool:
        """Whether requests wait that hold no blocks."""

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait, those that hold blocks included."""

    @property
    def num_unfinished(self) -> int:
        """Number of requests that may still run without anything else to come."""

    @property
    def running_max(self) -> int:
        """Maximum number of running requests."""

    @property
    def tokens_max(self) -> int:
        """Maximum number of tokens that a step computes."""

    def leave_out(self, request_ids: Sequence[str]) -> None:
        """Have these running requests compute nothing in the coming step."""

    def asked(self) -> Asked:
        """What running requests ask of the coming step."""

    def claims(self) -> Claims:
        """What running requests still need while waiting requests are looked at."""


IN_VAIN_MAX = 20
"""Maximum number of steps in a row, each of which halves a chunk that found no residents."""


class StepTerms(NamedTuple):
    """Bounds of a step for the scheduler.

    Attributes:
        tokens: Maximum number of tokens that the step computes; 0 if it is paused.
        paused: Whether it schedules nothing because rows of the pool are on their way.
    """

    tokens: int
    paused: bool = False


class _Counted(NamedTuple):
    """Blocks of a step's requests, counted some steps ago.

    Attributes:
        requests: number of requests of that step.
        blocks: number of blocks that they had in use.
        steps: number of steps since, in which the same requests decoded.
    """

    requests: int = 0
    blocks: int = 0
    steps: int = 0


class Controller:
    """Calls the parts of the policy in their order, once a step.

    Attributes:
        admission: Decides about waiting requests; the scheduler asks it within the step.
        decider: Decides the step's bounds.
        turns: Decides who of the running requests is left out.
        pool: Decides how much CPU memory there is to be; None if all of it is there.
        step_blocks: Number of blocks that prompts may fill in a step, about. A step may compute
            more where residents are free: then it demotes less.
    """

    def __init__(
        self,
        scheduler: SchedulerView,
        residency: Residency,
        admission: Admission,
        decider: Decides,
        block_size: int,
        *,
        priority: Callable[[str], int] | None = None,
        splits: bool = True,
        cost: int = 1,
        speculation: Speculation = NO_SPECULATION,
        drafts: DraftsInFlight | None = None,
        turns: bool = True,
    ) -> None:
        """Start before the first step.

        Args:
            scheduler: Whose steps.
            residency: Where blocks live.
            admission: Decides about waiting requests.
            decider: Decides the step's bounds.
            block_size: Tokens of a block.
            priority: Priority of a request, of which lower ones go first; None if all are equal.
            splits: Whether prompts may be split anywhere, so that a step's tokens can be bounded.
            cost: Number of residents that a block of a prompt takes in all groups of layers.
            speculation: How many tokens a step computes for a request that decodes.
            drafts: Draft tokens of the steps in flight; None if there never are any.
            turns: Whether a running request may be left out of a step.
        """
        self._scheduler, self._residency = scheduler, residency
        self._tokens_max = speculation.tokens_max
        self._lookahead = speculation.lookahead
        self._blocks_max = speculation.blocks_max(block_size)
        self._size, self._priority, self._splits = block_size, priority, splits
        self._cost = cost
        self.admission = admission
        admission.room.claims = scheduler.claims
        self.decider = decider
        self.turns = Turns(allowed=turns)
        self.pool: ElasticPool | None = None
        resident = residency.geometry.resident_blocks
        self.step_blocks = min(cdiv(scheduler.tokens_max, block_size), resident // (2 * cost))
        self._completions = CompletedBlocks(block_size, residency, drafts, self._tokens_max)
        self._stalls = AwaitedStalls()
        self._totals = Totals()
        self._prompts_under_way = self._paused = self._quiet = False
        self._restored = self._in_vain = 0
        self._counted = _Counted()

    @property
    def decision(self) -> Decision:
        """Bounds of the newest step in which anything could be pooled or admitted."""
        return self.admission.decision

    @property
    def chunks_held(self) -> int:
        """Number of chunks of the pool that the workers hold, as they said last."""
        chunks = self._residency.geometry.num_chunks
        return chunks if self.pool is None else self.pool.state.chunks

    def begin_step(self) -> StepTerms:
        """Before anything is scheduled: bounds of the step, and who is left out of it."""
        residency, running = self._residency, self._scheduler.running
        self._quiet = self._is_quiet(len(running))
        if self._quiet:
            self._paused = self.turns.taken = self.turns.exceeds = False
            residency.parking.copies.allowance = self.decision.parked_at_once
            return StepTerms(self._scheduler.tokens_max)
        prompts = self._prompt_tokens(running) if self._prompts_under_way else 0
        blocks = self._cost * (len(running) * self._blocks_max + prompts // self._size)
        self._restored = residency.parking.restored_blocks
        self._paused = self.pool is not None and self._waits_for_rows(self.pool, blocks)
        if self._paused:
            return StepTerms(0, paused=True)
        decision = self.decider.decide(prompts)
        self.admission.begin_step(decision, blocks)
        residency.parking.copies.allowance = decision.parked_at_once
        residency.ahead_max = demoted_at_once(len(running), self._size)
        self._scheduler.leave_out(
            self.turns.begin_step(running, residency, decision, self._priority)
        )
        chunk = self._chunk(len(running))
        self.admission.room.chunk_blocks = chunk.blocks
        return StepTerms(chunk.tokens)

    def end_step(
        self, scheduled: Mapping[str, int], tokens: int, fresh: Collection[str], drafts: int = 0
    ) -> StepOrders:
        """After it is known who runs, and its tokens are counted as computed.

        Args:
            scheduled: Number of tokens of each request that runs, by id.
            tokens: Sum of these.
            fresh: Ids of those that got their first blocks in the step.
            drafts: Number of draft tokens among ``tokens``.
        """
        residency = self._residency
        prompts = tokens - drafts > len(scheduled) or bool(fresh)
        if self._quiet and not prompts and not residency.parking.pending:
            return self._end_quiet_step(scheduled)
        plan = self._plan(scheduled, fresh, prompts)
        in_vain = not tokens and self.admission.refused == "residents"
        self._in_vain = min(self._in_vain + 1, IN_VAIN_MAX) if in_vain else 0
        order = self._order(scheduled, changed=plan is not None and len(plan.stores) > 0)
        if not self._paused:
            self.turns.end_step(scheduled, residency)
        blocks = self._blocks_of(scheduled)
        self._counted = _Counted(len(scheduled), blocks)
        restored = residency.parking.restored_blocks != self._restored
        return StepOrders(plan, order, blocks, not self.turns.exceeds, restored)

    def _is_quiet(self, running: int) -> bool:
        """Whether the coming step can neither pool, admit nor wait: most of its work is left out.

        Nothing is pooled, nobody waits or computes a prompt, and the free residents last for more
        than the step. What is evicted in it may still be parked.
        """
        residency, pool = self._residency, self.pool
        queue = residency.queue
        return not (
            residency.read_set.by_request
            or self._prompts_under_way
            or self._scheduler.num_waiting
            or queue.frozen
            or self._short(running)
            or (pool is not None and not pool.settled(residency.supply.chunks_usable))
        )

    def _short(self, running: int) -> bool:
        """Whether the free residents may not last for two steps of so many running requests."""
        decodes = running * self._blocks_max
        return self._residency.queue.free_residents < self._cost * (2 * self.step_blocks + decodes)

    def _end_quiet_step(self, scheduled: Mapping[str, int]) -> StepOrders:
        """``end_step`` of a quiet step in which nothing was evicted, admitted or prefilled."""
        self._completions.pass_step()
        self._residency.planner.pass_step()
        order = self._order(scheduled, changed=False)
        requests, (known, blocks, steps) = len(scheduled), self._counted
        if requests != known or steps >= self._size // self._tokens_max:
            blocks, steps = self._blocks_of(scheduled), 0
        self._counted = _Counted(requests, blocks, steps + 1)
        # Each request fills a block in as many steps as it has tokens, or in fewer.
        return StepOrders(None, order, blocks + requests * steps // self._size)

    def _order(self, scheduled: Mapping[str, int], *, changed: bool) -> PoolOrder:
        """What the workers are to hold; ``changed`` is whether more may be held than before."""
        residency, pool = self._residency, self.pool
        if pool is None:
            return PoolOrder(residency.geometry.num_chunks)
        in_use = scheduled or residency.read_set.by_request
        order = pool.end_step(
            residency.rows.chunks_held,
            changed=changed,
            idle=not (in_use or self._scheduler.num_unfinished),
            short=self._short(len(self._scheduler.running)),
        )
        if pool.usable < residency.supply.chunks_usable and not pool.asking:
            # At once: requests that end before the next step may be kept in rows.
            residency.supply.use_chunks(pool.usable, pool.expected)
        return order

    def _blocks_of(self, scheduled: Mapping[str, int]) -> int:
        """Blocks that attention reads: not what requests hold that are left out of the step."""
        return sum(map(len, map(self._residency.tables.__getitem__, scheduled)))

    def observe(
        self,
        orders: StepOrders,
        report: StepReport | None,
        tokens: int,
        requests: int,
        drafts: int = 0,
    ) -> None:
        """Learn what became of a step; its copies count in ``report.totals`` of all so far.

        Args:
            orders: The step's, from ``end_step``.
            report: The workers', of the same step; None if there is none.
            tokens: Number of tokens that it computed.
            requests: Number of requests that ran in it.
            drafts: Number of draft tokens among ``tokens``.
        """
        if report is not None:
            before, self._totals = self._totals, report.totals
            if not report.failure:
                self._learn(orders, report, before, tokens, requests + drafts)
        if self.pool is not None:
            if report is None:
                self.pool.unanswered(orders.pool)
            else:
                self.pool.report(report.pool)

    def _learn(
        self, orders: StepOrders, report: StepReport, before: Totals, tokens: int, verified: int
    ) -> None:
        """Tell the decider of a step, and of earlier ones whose stall is known only now.

        What it computes of requests that decode takes time by the token, verified drafts included.
        """
        totals = report.totals
        loaded = totals.bytes_loaded - before.bytes_loaded
        busy = totals.load_seconds - before.load_seconds
        if busy > 0:
            finished = totals.bytes_finished - before.bytes_finished
            busy = speed_of_finished(loaded, finished, busy)
        seen = Observation(
            tokens, verified, report.seconds, 0.0, loaded, busy, orders.blocks, orders.restored
        )
        if totals.graph_steps != before.graph_steps:
            # Nothing in a graph is timed: what its loads cost shows in the time of the step.
            self.decider.observe(seen, within_budget=False)
        elif orders.plan is None or not orders.plan.forward:
            self.decider.observe(seen, within_budget=orders.within_budget)
        else:
            self._stalls.add(orders.plan.step, seen, orders.within_budget)
            for late in self._stalls.overdue():
                self.decider.observe(late, within_budget=False)
        if totals.stall_step != before.stall_step:
            for known, within in self._stalls.take(totals.stall_step, totals.step_stall):
                self.decider.observe(known, within_budget=within)

    def _prompt_tokens(self, running: Sequence[Any]) -> int:
        """Prompt tokens that running requests will compute in the coming step, about."""
        left = sum(r.num_tokens - r.num_computed_tokens for r in running if r.is_prefill_chunk)
        room = self._residency.queue.num_free_blocks * self._size
        return int(min(left, self._scheduler.tokens_max, room))

    def _waits_for_rows(self, pool: ElasticPool, blocks: int) -> bool:
        """Use the rows that are there; whether the step waits for others, or to hear of them.

        Args:
            pool: Knows which are there.
            blocks: Number of blocks that the running requests may take in the step.
        """
        residency, queue = self._residency, self._residency.queue
        if pool.begin_step(residency.rows.chunks_held):
            residency.forget_idle()
        now = pool.usable, pool.expected
        supply = residency.supply
        if not pool.asking and now != (supply.chunks_usable, supply.chunks_expected):
            supply.use_chunks(*now)
        if self._scheduler.newcomers:
            blocks += self._cost * (self.step_blocks + 1)
        short = queue.withheld > queue.missing and queue.num_free_blocks < blocks
        return pool.paused(short and not queue.frozen and queue.available_pooled < queue.demotable)

    def _chunk(self, running: int) -> Chunk:
        """How many tokens the coming step computes, so that they find resident pages."""
        scheduler, queue, size = self._scheduler, self._residency.queue, self._size
        most = scheduler.tokens_max
        waiting = bool(scheduler.num_waiting)
        asks = waiting or self._prompts_under_way
        kept, ahead = 0, self._lookahead
        if self._residency.shared and not running:
            # Who comes alone has to fit with its windows and its state, found ones included.
            kept = self._residency.parking.tails.blocks_max + self._cost * (
                (1 << self._in_vain) - 1
            )
        blocks = running * self._blocks_max + cdiv(ahead, size)
        if not (asks and self._splits) or plenty(queue, most, blocks, size, self._cost, kept):
            return Chunk(most, cdiv(most, size))
        self._completions.catch_up()
        stores = self.decision.prompt_demotion_max
        asked = scheduler.asked()
        if not running and self._residency.parking.tails:
            ahead += size - 1  # One that comes back goes on within a block, and must fit alone.
        return decide_chunk(queue, asked, waiting, stores, most, size, self._cost, kept, ahead)

    def _plan(
        self, scheduled: Mapping[str, int], fresh: Collection[str], prompts: bool
    ) -> StepPlan | None:
        """What the step copies and relabels; ``prompts`` is whether it computes any."""
        scheduler, residency, decision = self._scheduler, self._residency, self.decision
        several: Collection[str] = ()
        if prompts:
            most = self._tokens_max
            several = [r for r, count in scheduled.items() if count > most and r not in fresh]
        self._completions.next_step(scheduler.requests, several, fresh)
        running = len(scheduler.running)
        headroom = None
        if residency.read_set.by_request and (
            not scheduler.newcomers
            or running >= scheduler.running_max
            or residency.pooled_in_use > decision.pooled_admission_max
        ):
            headroom = self._cost * tail_room(running * self._tokens_max, self._size)
        if not self._paused:
            # One that is left out of the step has prompt tokens left all the same.
            self._prompts_under_way = prompts or (
                self._prompts_under_way and any(r.is_prefill_chunk for r in scheduler.running)
            )
        chunk = self.admission.room.chunk_blocks
        ahead = Ahead.of(decision, self.turns.taken, running, chunk, prompts)
        return residency.end_step(
            scheduled, fresh, bool(scheduled), headroom, decision.load_blocks_max, ahead
        )

"""Replays a trace of requests through the real policy, with a model of time.

For tests, for choosing constants, and for projections: deterministic, no model, no copies. The
scheduler around the policy is ``pie_vllm.simulation.scheduler``; the controller that it calls is
the one that vLLM's scheduler calls, and all of the pool's memory is there. There is no prefix cache
unless asked for; with one, a chat finds what is left of its turns before. KV may be parked, without
one that of preempted requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.plan import PoolState, StepOrders, StepReport, Totals, num_copied
from pie_vllm.policy.control.decider import Decides, Decision
from pie_vllm.policy.controller import Controller
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.simulation.prefix_cache import Block, Free, PrefixBook
from pie_vllm.simulation.scheduler import Request, SimulatedScheduler
from pie_vllm.simulation.traces import Job, Outcome, Profile, Static, StepCost, StepTime


class Simulation:
    """One trace on one machine; ``run`` plays it to the end.

    Attributes:
        residency: Where blocks live.
        controller: The policy around each step.
    """

    def __init__(
        self,
        geometry: Geometry,
        profile: Profile,
        jobs: Sequence[Job],
        decider: Decides,
        *,
        block_size: int = 16,
        max_running: int = 256,
        max_tokens: int = 2048,
        changes: Sequence[tuple[float, Profile]] = (),
        scatter: Callable[[], float] | None = None,
        caching: bool = False,
        parking: str | None = None,
    ) -> None:
        """Before the first request.

        Args:
            geometry: of the tiers.
            profile: of the machine.
            jobs: the trace; a turn of a chat stands behind the turn that it continues.
            decider: what decides, from what it observes.
            block_size: tokens of a block.
            max_running: vLLM's ``--max-num-seqs``.
            max_tokens: vLLM's ``--max-num-batched-tokens``.
            changes: the machine that steps meet from a time (seconds) on, in order of time.
            scatter: asked for the factor of each step's compute; None is 1.
            caching: whether there is a prefix cache.
            parking: policy of eviction of parked KV; None parks nothing. Without ``caching`` KV of
                preempted requests is parked.

        Raises:
            ValueError: a turn continues none of the jobs before it.
        """
        self._geometry, self._profile = geometry, profile
        self._size = block_size
        self._jobs = jobs
        self._keys: list[list[Hashable]] = []
        self._history: list[int] = []  # Tokens of the turns before each job.
        self._next: dict[int, list[int]] = {}  # The turns that continue a job.
        for number, job in enumerate(jobs):
            self._note(number, job, caching)
        self._coming = [(job.arrival, i) for i, job in enumerate(jobs) if job.after is None]
        heapify(self._coming)
        tables: dict[str, list[Any]] = {}
        book = PrefixBook()
        blocks = [Block(i) for i in range(geometry.num_blocks)]
        self.residency = Residency(geometry, blocks, Free, tables, book.entries, parking)
        self.residency.queue.popleft().is_null = True
        self._scheduler = SimulatedScheduler(
            self.residency,
            tables,
            book,
            block_size,
            max_running,
            max_tokens,
            by_request=parking is not None and not caching,
        )
        self.controller = Controller(
            self._scheduler, self.residency, self._scheduler.admission, decider, block_size
        )
        self._changes = deque(changes)
        self._totals = Totals()
        self._scatter = scatter
        self._clock = self._stall = 0.0
        self._number = self._tokens = self._prompt_tokens = self._recomputed = 0
        self._first: dict[str, float] = {}
        self._loads: list[int] = []
        self._decisions: list[Decision] = []
        self._times: list[StepTime] = []

    def _note(self, number: int, job: Job, caching: bool) -> None:
        """What a job shares with the turns before it: tokens, and keys of full blocks."""
        before, shared = 0, []  # type: int, list[Hashable]
        if job.after is not None:
            if not 0 <= job.after < number:
                raise ValueError(f"job {number} continues job {job.after}, which is not before it")
            self._next.setdefault(job.after, []).append(number)
            earlier = self._jobs[job.after]
            before = self._history[job.after] + earlier.prompt + earlier.answer
            shared = self._keys[job.after]
        self._history.append(before)
        blocks = (before + job.prompt + job.answer) // self._size if caching else 0
        own: list[Hashable] = [(number, index) for index in range(len(shared), blocks)]
        self._keys.append(shared + own)

    def run(self, most_steps: int = 1_000_000) -> Outcome:
        """Play the trace.

        Raises:
            RuntimeError: it did not end within ``most_steps``.
        """
        scheduler, parking = self._scheduler, self.residency.parking
        while self._coming or scheduler.waiting or scheduler.running:
            if self._number >= most_steps:
                raise RuntimeError(f"the trace did not end within {most_steps} steps")
            self._arrive()
            self._step()
        return Outcome(
            self._clock,
            self._tokens,
            self._stall,
            self._number,
            scheduler.preemptions,
            self.controller.turns.left_out,
            self._loads,
            self._decisions,
            self._times,
            [self._first[str(i)] for i in range(len(self._jobs))],
            self._prompt_tokens,
            self._recomputed,
            parking.parked_blocks,
            scheduler.restored,
            parking.lost_blocks,
        )

    def _arrive(self) -> None:
        coming, waiting = self._coming, self._scheduler.waiting
        if not waiting and not self._scheduler.running and coming:
            self._clock = max(self._clock, coming[0][0])
        while coming and coming[0][0] <= self._clock:
            arrived, number = heappop(coming)
            job, keys = self._jobs[number], self._keys[number]
            prompt = self._history[number] + job.prompt
            self._scheduler.add(Request(str(number), prompt, job.answer, keys, arrived))
        while self._changes and self._changes[0][0] <= self._clock:
            self._profile = self._changes.popleft()[1]

    def _step(self) -> None:
        self._number += 1
        scheduler, controller = self._scheduler, self.controller
        terms = controller.begin_step()
        scheduled = scheduler.schedule(terms.tokens)
        ran = [scheduler.requests[name] for name in scheduled.tokens]
        for request in ran:
            self._compute(request, scheduled.tokens[request.request_id])
        tokens = sum(scheduled.tokens.values())
        orders = controller.end_step(scheduled.tokens, tokens, scheduled.fresh)
        self._decisions.append(controller.decision)
        cost = self._cost(orders, ran, tokens)
        controller.observe(orders, self._report(orders, cost), tokens, len(ran))
        began, before = self._clock, self._tokens
        self._clock += cost.seconds
        self._stall += cost.stall
        for request in ran:
            if not request.is_prefill_chunk:
                self._answer(request)
        answered = self._tokens - before
        self._times.append(StepTime(began, cost.compute, cost.stall, answered, cost.slowed))

    def _compute(self, request: Request, tokens: int) -> None:
        before = request.num_computed_tokens
        after = request.num_computed_tokens = before + tokens
        request.is_prefill_chunk = after < request.num_tokens
        self._prompt_tokens += max(0, min(after, request.prompt) - before)
        self._recomputed += max(0, min(after, request.reached) - before)
        request.reached = max(after, request.reached)

    def _cost(self, orders: StepOrders, ran: Sequence[Request], tokens: int) -> StepCost:
        """How long the step takes on the machine."""
        profile, plan = self._profile, orders.plan
        blocks = sum(len(request.table) for request in ran)
        compute = profile.step_seconds(len(ran), tokens - len(ran), blocks)
        if self._scatter is not None:
            compute *= self._scatter()
        loads, stores = self.residency.read_set.num_blocks, 0
        if plan is not None:
            loads += num_copied(plan.promotions)
            stores = num_copied(plan.stores)
        self._loads.append(loads)
        return profile.step(compute, loads, stores, self._geometry.load_bytes)

    def _report(self, orders: StepOrders, cost: StepCost) -> StepReport:
        """What workers would say of the step, with its stall known at once."""
        before, loaded = self._totals, self._loads[-1] * self._geometry.load_bytes
        totals = self._totals = before._replace(
            bytes_loaded=before.bytes_loaded + loaded,
            bytes_finished=before.bytes_finished + loaded,
            load_seconds=before.load_seconds + cost.load,
        )
        if orders.plan is not None:
            totals = self._totals = totals._replace(
                stall_step=orders.plan.step, step_stall=cost.stall
            )
        return StepReport(totals, PoolState(self._geometry.num_chunks), cost.seconds)

    def _answer(self, request: Request) -> None:
        """A request has its next token now."""
        request.num_tokens += 1
        request.left -= 1
        self._tokens += 1
        self._first.setdefault(request.request_id, self._clock - request.arrived)
        if request.left == 0:
            self._scheduler.finish(request)
            for number in self._next.get(int(request.request_id), ()):
                heappush(self._coming, (self._clock + self._jobs[number].arrival, number))


def run_stock(blocks: int, profile: Profile, jobs: Sequence[Job], **options: Any) -> Outcome:
    """Play a trace with so many blocks on the device and no pooled one.

    Args:
        blocks: with the null block.
        profile: of the machine.
        jobs: the trace.
        options: keywords of ``Simulation``.
    """
    geometry = Geometry(1, 1, blocks, 1, 1, 1, 1, 1)
    simulation = Simulation(geometry, profile, jobs, Static(1), **options)
    simulation.residency.supply.use_chunks(0)
    return simulation.run()

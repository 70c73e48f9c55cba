"""Replays a trace of requests through the real tiers, turns and decider, with a model of time.

For tests, for choosing constants, and for projections: deterministic, no model, no copies. The
scheduler around the policy is ``pie_vllm.simulation.scheduler``. There is no prefix cache
unless asked for; with one, KV may be parked, and a chat finds what is left of its turns before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.plan import StepPlan, num_copied
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.control.detector import Observation
from pie_vllm.policy.control.turns import Turns
from pie_vllm.policy.placement.residency import Residency, tail_room
from pie_vllm.policy.placement.store_ahead import Ahead
from pie_vllm.simulation.prefix_cache import Block, Free, PrefixBook
from pie_vllm.simulation.scheduler import Request, SimulatedScheduler
from pie_vllm.simulation.traces import Decides, Job, Outcome, Profile, Static, StepTime


class Simulation:
    """One trace on one machine; ``run`` plays it to the end."""

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
            parking: policy of eviction of parked KV; None parks nothing, as without ``caching``.

        Raises:
            ValueError: a turn continues none of the jobs before it.
        """
        self._geometry, self._profile, self._decider = geometry, profile, decider
        self._size = block_size
        self._max_tokens = max_tokens
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
        self.residency = Residency(
            geometry, blocks, Free, tables, book.entries, parking if caching else None
        )
        self.residency.queue.popleft().is_null = True
        self._scheduler = SimulatedScheduler(
            self.residency, tables, book, block_size, max_running, max_tokens
        )
        self._changes = deque(changes)
        self._turns = Turns()
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
            self._turns.left_out,
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
            waiting.append(Request(str(number), prompt, job.answer, keys, arrived))
        while self._changes and self._changes[0][0] <= self._clock:
            self._profile = self._changes.popleft()[1]

    def _step(self) -> None:
        self._number += 1
        scheduler, residency, size = self._scheduler, self.residency, self._size
        running, parking = scheduler.running, residency.parking
        prompts = sum(max(0, r.known - r.computed - 1) for r in running)
        room = residency.queue.num_free_blocks * size
        decision = self._decider.decide(min(prompts, self._max_tokens, room))
        parking.allowance = decision.park_blocks_max
        restored = parking.restored_blocks
        left_out = self._turns.begin_step(running, residency, decision)
        ran, fresh = scheduler.schedule(decision, set(left_out))
        for request, tokens in ran.values():
            self._compute(request, tokens)
            tell = residency.computed_again if request.request_id in fresh else residency.computed
            tell(request.request_id, request.computed // size)
        over = residency.pooled_in_use > decision.pooled_admission_max
        headroom = tail_room(len(running), size) if over or not scheduler.waiting else None
        several = any(tokens > 1 for _, tokens in ran.values())
        ahead = Ahead.of(decision, self._turns.taken, len(running), scheduler.chunk_blocks, several)
        plan = residency.end_step(ran, fresh, bool(ran), headroom, decision.load_blocks_max, ahead)
        self._turns.end_step(ran, residency)
        self._pass_time(ran, plan, restored=parking.restored_blocks != restored)
        self._decisions.append(decision)

    def _compute(self, request: Request, tokens: int) -> None:
        before, after = request.computed, request.computed + tokens
        self._prompt_tokens += max(0, min(after, request.prompt) - before)
        self._recomputed += max(0, min(after, request.reached) - before)
        request.computed, request.reached = after, max(after, request.reached)

    def _pass_time(
        self, ran: dict[str, tuple[Request, int]], plan: StepPlan | None, *, restored: bool
    ) -> None:
        profile, row = self._profile, self._geometry.row_bytes
        loads = self.residency.reading.num_blocks
        if plan is not None:
            loads += num_copied(plan.promotions)
        tokens = sum(count for _, count in ran.values())
        blocks = sum(len(request.table) for request, _ in ran.values())
        compute = profile.step_seconds(len(ran), tokens - len(ran), blocks)
        if self._scatter is not None:
            compute *= self._scatter()
        slowed = profile.load_cost(loads)
        compute += slowed
        load = loads * row / profile.link
        stall = max(load - compute, load * profile.exposed)
        if plan is not None and profile.store_link is not None:
            store = num_copied(plan.stores) * row / profile.store_link
            stall = max(stall, store - compute, store * profile.exposed)
        began = self._clock
        self._clock += compute + stall
        self._stall += stall
        self._loads.append(loads)
        seconds, loaded = compute + stall, loads * row
        seen = Observation(tokens, len(ran), seconds, stall, loaded, load, blocks, restored)
        self._decider.observe(seen, within_budget=not self._turns.exceeds)
        before = self._tokens
        for request, _ in ran.values():
            if request.computed == request.known:
                self._answer(request)
        self._times.append(StepTime(began, compute, stall, self._tokens - before, slowed))

    def _answer(self, request: Request) -> None:
        """A request has its next token now."""
        request.known += 1
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
    simulation.residency.use_chunks(0)
    return simulation.run()

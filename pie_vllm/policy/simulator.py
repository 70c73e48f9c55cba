"""Replays a trace of requests through the real tiers, turns and decider, with a model of time.

For tests, for choosing constants, and for projections: deterministic, no model, no copies. The
scheduler around the policy is a plain one of vLLM's kind: first come first served, chunked
prompts, one token a step for each request past its prompt, preemption of the last with
recomputation. No prefix cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pie_vllm.policy.decider import Decision
from pie_vllm.policy.detector import Observation
from pie_vllm.policy.entries import PrefixEntries
from pie_vllm.policy.geometry import Geometry, cdiv, chunk_blocks_of
from pie_vllm.policy.plan import num_copied
from pie_vllm.policy.promotion import tail_room
from pie_vllm.policy.residency import Residency
from pie_vllm.policy.rotation import Turns
from pie_vllm.policy.traces import (
    Block,
    Decides,
    Free,
    Job,
    Outcome,
    Profile,
    Static,
    StepTime,
)


@dataclass
class _Request:
    request_id: str
    prompt: int
    left: int
    known: int
    computed: int = 0
    table: list[Any] = field(default_factory=list)


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
    ) -> None:
        """Before the first request.

        Args:
            geometry: of the tiers.
            profile: of the machine.
            jobs: the trace, in order of arrival.
            decider: what decides, from what it observes.
            block_size: tokens of a block.
            max_running: vLLM's ``--max-num-seqs``.
            max_tokens: vLLM's ``--max-num-batched-tokens``.
            changes: the machine that steps meet from a time (seconds) on, in order of time.
            scatter: asked for the factor of each step's compute; None is 1.
        """
        self._geometry, self._profile, self._decider = geometry, profile, decider
        self._size, self._max_running = block_size, max_running
        self._chunk = chunk_blocks_of(max_tokens, block_size, geometry)
        self._jobs = deque(
            _Request(str(i), job.prompt, job.answer, job.prompt) for i, job in enumerate(jobs)
        )
        self._arrivals = deque(job.arrival for job in jobs)
        self._tables: dict[str, list[Any]] = {}
        self.residency = Residency(
            geometry,
            [Block(i) for i in range(geometry.num_blocks)],
            Free,
            self._tables,
            PrefixEntries(lambda source, target: None, lambda block: None),  # noqa: ARG005
        )
        self.residency.queue.popleft().is_null = True
        self._changes = deque(changes)
        self._turns = Turns()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._scatter = scatter
        self._clock = self._stall = 0.0
        self._number = self._tokens = self._preemptions = 0
        self._loads: list[int] = []
        self._decisions: list[Decision] = []
        self._times: list[StepTime] = []

    def run(self, most_steps: int = 1_000_000) -> Outcome:
        """Play the trace.

        Raises:
            RuntimeError: it did not end within ``most_steps``.
        """
        while self._jobs or self._waiting or self._running:
            if self._number >= most_steps:
                raise RuntimeError(f"the trace did not end within {most_steps} steps")
            self._arrive()
            self._step()
        return Outcome(
            self._clock,
            self._tokens,
            self._stall,
            self._number,
            self._preemptions,
            self._turns.left_out,
            self._loads,
            self._decisions,
            self._times,
        )

    def _arrive(self) -> None:
        if not self._waiting and not self._running and self._arrivals:
            self._clock = max(self._clock, self._arrivals[0])
        while self._arrivals and self._arrivals[0] <= self._clock:
            self._arrivals.popleft()
            self._waiting.append(self._jobs.popleft())
        while self._changes and self._changes[0][0] <= self._clock:
            self._profile = self._changes.popleft()[1]

    def _step(self) -> None:
        self._number += 1
        prompts = sum(max(0, r.known - r.computed - 1) for r in self._running)
        decision = self._decider.decide(min(prompts, self._chunk * self._size))
        residency, size = self.residency, self._size
        left_out = self._turns.begin_step(self._running, residency, decision)
        ran, fresh = self._schedule(decision, set(left_out))
        for request, tokens in ran.values():
            request.computed += tokens
            tell = residency.computed_again if request.request_id in fresh else residency.computed
            tell(request.request_id, request.computed // size)
        over = residency.pooled_in_use > decision.limit
        headroom = tail_room(len(self._running), size) if over or not self._waiting else None
        plan = residency.end_step(ran, fresh, bool(ran), headroom, decision.budget)
        self._turns.end_step(ran, residency)
        promoted = num_copied(plan.promotions) if plan else 0
        loads = residency.reading.num_blocks + promoted
        self._pass_time(ran, loads, within_budget=not self._turns.exceeds)
        self._decisions.append(decision)

    def _schedule(
        self, decision: Decision, left_out: set[str]
    ) -> tuple[dict[str, tuple[_Request, int]], set[str]]:
        budget = self._chunk * self._size
        ran: dict[str, tuple[_Request, int]] = {}
        fresh: set[str] = set()
        preempted = False
        for request in list(self._running):
            if request.request_id in left_out or request not in self._running or budget <= 0:
                continue
            tokens = min(request.known - request.computed, budget)
            while not self._allocate(request, tokens):
                last = self._running.pop()
                preempted = True
                self._preemptions += 1
                budget += ran.pop(last.request_id, (last, 0))[1]
                self._free(last)
                last.computed = 0
                self._waiting.appendleft(last)
                if last is request:
                    break
            else:
                ran[request.request_id] = (request, tokens)
                budget -= tokens
        while self._waiting and budget > 0 and not preempted:
            request = self._waiting[0]
            tokens = min(request.known, budget)
            if len(self._running) >= self._max_running or not self._admit(
                request, tokens, decision, bool(ran)
            ):
                break
            self._running.append(self._waiting.popleft())
            ran[request.request_id] = (request, tokens)
            fresh.add(request.request_id)
            budget -= tokens
        return ran, fresh

    def _admit(self, request: _Request, tokens: int, decision: Decision, others: bool) -> bool:
        """As PieBlockSpaceManager admits."""
        residency = self.residency
        queue = residency.queue
        kept_back = residency.window - decision.limit if others else 0
        if cdiv(request.known, self._size) + kept_back > queue.free_in_all:
            return False
        partial = tokens < request.known or any(r.known > r.computed + 1 for r in self._running)
        queue.admission(0, self._chunk + 1 if others and partial else 0)
        try:
            residency.admit(request.request_id)
            self._tables[request.request_id] = request.table
            if self._allocate(request, tokens):
                return True
            residency.forget(request.request_id)
            return False
        finally:
            queue.admission()

    def _allocate(self, request: _Request, tokens: int) -> bool:
        count = cdiv(request.computed + tokens, self._size) - len(request.table)
        queue = self.residency.queue
        if count > queue.num_free_blocks:
            return False
        if count > 0:
            for block in queue.popleft_n(count):
                block.ref_cnt = 1
                request.table.append(block)
        return True

    def _free(self, request: _Request) -> None:
        self.residency.forget(request.request_id)
        blocks = list(reversed(self._tables.pop(request.request_id)))
        request.table = []
        for block in blocks:
            block.ref_cnt = 0
        self.residency.queue.prepend_n(blocks)

    def _pass_time(
        self, ran: dict[str, tuple[_Request, int]], loads: int, *, within_budget: bool
    ) -> None:
        profile, row = self._profile, self._geometry.row_bytes
        tokens = sum(count for _, count in ran.values())
        blocks = sum(len(request.table) for request, _ in ran.values())
        compute = profile.step_seconds(len(ran), tokens - len(ran), blocks)
        if self._scatter is not None:
            compute *= self._scatter()
        slowed = profile.load_cost(loads)
        compute += slowed
        load = loads * row / profile.link
        stall = max(load - compute, load * profile.exposed)
        began = self._clock
        self._clock += compute + stall
        self._stall += stall
        self._loads.append(loads)
        seen = Observation(tokens, len(ran), compute + stall, stall, loads * row, load, blocks)
        self._decider.observe(seen, within_budget=within_budget)
        before = self._tokens
        for request, _ in ran.values():
            if request.computed == request.known:
                request.known += 1
                request.left -= 1
                self._tokens += 1
                if request.left == 0:
                    self._running.remove(request)
                    self._free(request)
        self._times.append(StepTime(began, compute, stall, self._tokens - before, slowed))


def run_stock(blocks: int, profile: Profile, jobs: Sequence[Job], **options: Any) -> Outcome:
    """Play a trace with so many blocks on the device and no pooled one.

    Args:
        blocks: with the null block.
        profile: of the machine.
        jobs: the trace.
        options: keywords of ``Simulation``.
    """
    geometry = Geometry(1, 1, blocks, 1, 1, 1, 1, 1)
    simulation = Simulation(geometry, profile, jobs, Static(0), **options)
    simulation.residency.use_chunks(0)
    return simulation.run()

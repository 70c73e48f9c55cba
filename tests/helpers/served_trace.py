"""A trace on vLLM's real scheduler over a simulated machine, noted as the simulator's is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

from vllm.v1.outputs import ModelRunnerOutput

from pie_vllm.geometry import Geometry
from pie_vllm.plan import PoolState, StepOrders, StepReport, Totals, num_copied
from pie_vllm.policy.control.decider import Decider, Decision
from pie_vllm.policy.controller import Controller
from pie_vllm.simulation.simulator import Simulation
from pie_vllm.simulation.traces import Job, Profile
from tests.helpers import scheduling

BLOCK_SIZE = 16
VOCABULARY = 30_000


class Trace(NamedTuple):
    """A machine, its tiers, and what comes.

    Attributes:
        geometry: of the tiers; the pool is one chunk, so that all of it is there.
        profile: of the machine.
        jobs: in the order in which chats begin.
        running_max, tokens_max: vLLM's ``--max-num-seqs`` and ``--max-num-batched-tokens``.
        caching: whether there is a prefix cache.
        parking: policy of eviction of parked KV; None parks nothing.
    """

    geometry: Geometry
    profile: Profile
    jobs: Sequence[Job]
    running_max: int
    tokens_max: int
    caching: bool
    parking: str | None

    def decider(self) -> Decider:
        """What decides, on either side."""
        sizes = self.geometry
        return Decider(sizes.row_bytes, sizes.pooled_blocks, block_tokens=BLOCK_SIZE)


def random_trace(
    seed: int, *, pooled: int, budget: float, parking: bool, caching: bool | None = None
) -> Trace:
    """Chats of one to three turns that together want some three times the memory of both tiers.

    Args:
        seed: of all that is random.
        pooled: window.
        budget: pooled blocks that the link brings while a step computes, about.
        parking: whether KV is parked, with rows beyond the window.
        caching: whether there is a prefix cache; None is as ``parking``.
    """
    rng = random.Random(seed)
    rows = pooled + (rng.randint(20, 80) if parking else 0)
    sizes = scheduling.geometry(rng.randint(20, 40), pooled, rows, chunk_rows=rows)
    base = rng.uniform(0.005, 0.02)
    link = budget * sizes.row_bytes / base
    profile = Profile(
        link=link,
        base=base,
        per_request=rng.uniform(0, 5e-5),
        per_prompt_token=rng.uniform(1e-5, 1e-4),
        per_block=rng.uniform(0, 2e-5),
        exposed=1 / sizes.num_layers,
        store_link=link,
    )
    jobs: list[Job] = []
    now = 0.0
    for _ in range(rng.randint(16, 24)):
        now += rng.expovariate(20)
        jobs.append(Job(now, rng.randint(5, 150), rng.randint(2, 60)))
        for _ in range(rng.randint(0, 2)):
            wait, after = rng.expovariate(4), len(jobs) - 1
            jobs.append(Job(wait, rng.randint(1, 40), rng.randint(2, 40), after))
    running_max, tokens_max = rng.choice([4, 8, 32]), rng.choice([48, 128, 512])
    kind = "lru" if parking else None
    caching = parking if caching is None else caching
    return Trace(sizes, profile, jobs, running_max, tokens_max, caching, kind)


class Step(NamedTuple):
    """What was decided for a step, and what came of it."""

    decision: Decision
    left_out: tuple[str, ...]
    tokens: tuple[tuple[str, int], ...]
    fresh: tuple[str, ...]
    orders: StepOrders
    demotions: int
    promotions: int
    free: tuple[int, int]


class Notes:
    """Notes every step of a controller.

    Attributes:
        steps: so far.
    """

    def __init__(self, controller: Controller, residency: Any) -> None:
        """Wrap what begins and ends a step."""
        self.steps: list[Step] = []
        out: list[str] = []
        view: Any = controller._scheduler
        leave_out, end_step = view.leave_out, controller.end_step

        def leaves_out(names: Sequence[str]) -> None:
            out[:] = names
            leave_out(names)

        def ends_step(scheduled: Any, tokens: int, fresh: Any, drafts: int = 0) -> StepOrders:
            orders = end_step(scheduled, tokens, fresh, drafts)
            queue = residency.queue
            self.steps.append(
                Step(
                    controller.decision,
                    tuple(out),
                    tuple(scheduled.items()),
                    tuple(sorted(fresh)),
                    orders,
                    residency.demotions,
                    residency.promotions,
                    (queue.free_residents, queue.available_pooled),
                )
            )
            return orders

        view.leave_out, controller.end_step = leaves_out, ends_step  # type: ignore[method-assign]


def simulated(trace: Trace) -> list[Step]:
    """The steps of the simulator."""
    simulation = Simulation(
        trace.geometry,
        trace.profile,
        trace.jobs,
        trace.decider(),
        block_size=BLOCK_SIZE,
        max_running=trace.running_max,
        max_tokens=trace.tokens_max,
        caching=trace.caching,
        parking=trace.parking,
    )
    notes = Notes(simulation.controller, simulation.residency)
    simulation.run()
    return notes.steps


def served(trace: Trace) -> list[Step]:
    """The steps of vLLM's scheduler."""
    server = Server(trace)
    server.run()
    return server.notes.steps


class Server:
    """vLLM's scheduler, and a runner that takes as long as the machine."""

    def __init__(self, trace: Trace) -> None:
        """Before the first request."""
        self.trace = trace
        self.scheduler: Any = scheduling.make(
            trace.geometry,
            BLOCK_SIZE,
            parking=trace.parking or "off",
            enable_prefix_caching=trace.caching,
            max_num_seqs=trace.running_max,
            max_num_batched_tokens=trace.tokens_max,
            max_num_scheduled_tokens=trace.tokens_max,
            max_model_len=(trace.geometry.num_blocks - 1) * BLOCK_SIZE,
        )
        controller = self.scheduler.pie_controller
        controller.decider = trace.decider()
        self.residency = self.scheduler.kv_cache_manager.residency
        self.notes = Notes(controller, self.residency)
        self.clock = 0.0
        self.totals = Totals()
        self.known: list[list[int]] = [[] for _ in trace.jobs]
        self.coming = [(job.arrival, i) for i, job in enumerate(trace.jobs) if job.after is None]
        heapify(self.coming)

    def run(self) -> None:
        """Play the trace."""
        scheduler = self.scheduler
        while self.coming or scheduler.waiting or scheduler.running:
            self._arrive()
            output = scheduler.schedule()
            self.residency.check_integrity()
            seconds = self._report(output)
            self.clock += seconds
            for number in [int(name) for name in self._take(output, seconds)]:
                for after, job in enumerate(self.trace.jobs):
                    if job.after == number:
                        heappush(self.coming, (self.clock + job.arrival, after))

    def _arrive(self) -> None:
        scheduler, coming = self.scheduler, self.coming
        if not scheduler.waiting and not scheduler.running and coming:
            self.clock = max(self.clock, coming[0][0])
        while coming and coming[0][0] <= self.clock:
            _, number = heappop(coming)
            job = self.trace.jobs[number]
            rng = random.Random(number)
            before = [] if job.after is None else self.known[job.after]
            prompt = [*before, *(rng.randrange(VOCABULARY) for _ in range(job.prompt))]
            self.known[number] = list(prompt)
            scheduler.add_request(
                scheduling.make_request(str(number), prompt, job.answer, BLOCK_SIZE)
            )

    def _report(self, output: Any) -> float:
        """Count what the step copies; returns the seconds that it takes."""
        profile, row = self.trace.profile, self.trace.geometry.row_bytes
        requests, plan = output.num_scheduled_tokens, output.pie.plan
        blocks = sum(len(self.residency.tables[name]) for name in requests)
        prompts = output.total_num_scheduled_tokens - len(requests)
        loads, stores = self.residency.read_set.num_blocks, 0
        if plan is not None:
            loads += num_copied(plan.promotions)
            stores = num_copied(plan.stores)
        compute = profile.step_seconds(len(requests), prompts, blocks)
        cost = profile.step(compute, loads, stores, row)
        before = self.totals
        self.totals = before._replace(
            bytes_loaded=before.bytes_loaded + loads * row,
            bytes_finished=before.bytes_finished + loads * row,
            load_seconds=before.load_seconds + cost.load,
            stall_step=before.stall_step if plan is None else plan.step,
            step_stall=before.step_stall if plan is None else cost.stall,
        )
        return cost.seconds

    def _take(self, output: Any, seconds: float) -> list[str]:
        """Have vLLM take the step's tokens; returns the requests that have their answers."""
        names = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for name in names:
            works = self.scheduler.requests[name].is_prefill_chunk
            sampled.append([] if works else [random.Random(name).randrange(VOCABULARY)])
            self.known[int(name)] += sampled[-1]
        result: Any = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
        result.pie = StepReport(self.totals, PoolState(1), seconds)
        self.scheduler.update_from_output(output, result)
        return [name for name in names if name not in self.scheduler.requests]

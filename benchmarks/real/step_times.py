"""How long the steps of a run took, and the simulator's model of time that fits them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.real.in_process import scheduler_of
from pie_vllm.plan import num_copied
from pie_vllm.simulation.traces import Profile


class Step(NamedTuple):
    """One step of an engine.

    Attributes:
        seconds: time since the step before was done, the scheduler's part included.
        requests: number of requests that ran.
        prompt_tokens: tokens computed beyond one for each request.
        blocks: blocks that these requests hold.
        loads: blocks that came over the link for it: pooled ones that it reads, promotions.
    """

    seconds: float
    requests: int
    prompt_tokens: int
    blocks: int
    loads: int


def watch_steps(llm: Any) -> list[Step]:
    """A list that grows by one for each step of an engine in this process, stock's or pie's."""
    scheduler = scheduler_of(llm)
    manager = scheduler.kv_cache_manager
    tables = _full_attention(manager).req_to_blocks
    residency = getattr(manager, "residency", None)
    update = scheduler.update_from_output
    steps: list[Step] = []
    before = time.perf_counter()

    def updated(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal before
        scheduled = scheduler_output.num_scheduled_tokens
        blocks = sum(len(tables.get(name, ())) for name in scheduled)
        orders = getattr(scheduler_output, "pie", None)
        plan = orders.plan if orders else None
        promoted = num_copied(plan.promotions) if plan is not None else 0
        loads = residency.read_set.num_blocks + promoted if residency is not None else 0
        result = update(scheduler_output, *args, **kwargs)
        now = time.perf_counter()
        tokens = scheduler_output.total_num_scheduled_tokens - len(scheduled)
        steps.append(Step(now - before, len(scheduled), tokens, blocks, loads))
        before = now
        return result

    scheduler.update_from_output = updated
    return steps


def _full_attention(manager: Any) -> Any:
    """The manager of the group whose blocks a request keeps; the only one of a plain model."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = manager.coordinator.single_type_managers
    return next(
        (one for one in groups if isinstance(one.kv_cache_spec, FullAttentionSpec)), groups[0]
    )


def fit(steps: Sequence[Step]) -> tuple[float, float, float, float]:
    """Base, and seconds for each request, prompt token and block, none negative.

    Least squares of the relative errors; of the sets of terms whose factors come out positive,
    the one that fits best.
    """
    import numpy

    seconds = numpy.array([step.seconds for step in steps])
    terms = numpy.array([(1, step.requests, step.prompt_tokens, step.blocks) for step in steps])
    weighted = terms / seconds[:, None]
    best, found = float("inf"), (0.0, 0.0, 0.0, 0.0)
    for used in itertools.product((False, True), repeat=4):
        columns = [i for i in range(4) if used[i]]
        if not columns:
            continue
        factors = numpy.linalg.lstsq(weighted[:, columns], numpy.ones(len(steps)), rcond=None)[0]
        if min(factors) < 0:
            continue
        error = float(((weighted[:, columns] @ factors - 1) ** 2).sum())
        if error < best - 1e-9:
            best = error
            whole = dict(zip(columns, map(float, factors), strict=True))
            found = (whole.get(0, 0.0), whole.get(1, 0.0), whole.get(2, 0.0), whole.get(3, 0.0))
    return found


def slowed_by_loads(profile: Profile, steps: Sequence[Step], stall_seconds: float) -> float:
    """Seconds by which each load slowed these steps of pie, beyond the stall and the model."""
    over = sum(step.seconds - profile.step_seconds(*step[1:4]) for step in steps) - stall_seconds
    return max(over, 0.0) / max(sum(step.loads for step in steps), 1)

"""What a scheduler decided in each step, and the bytes that its plans imply."""

from __future__ import annotations

from typing import Any

from pie_vllm.plan import NO_RUNS, num_copied


class Recorder:
    """Notes schedules, plans and preemptions of one scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._record: dict[str, Any] = {}
        self._scheduler = scheduler
        self._numbers: dict[str, int] = {}
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._note(output)
            return output

        def preempted(request: Any, *args: Any, **kwargs: Any) -> Any:
            self._record["preempted"].append(request.priority)
            return preempt(request, *args, **kwargs)

        scheduler.schedule, scheduler._preempt_request = scheduled, preempted

    def start(self) -> dict[str, Any]:
        """Begin a record; it fills while steps run.

        Returns:
            ``schedule``: for each step that runs something, tokens by request, requests numbered by
            their first appearance; ``plans``; ``preempted``: priority of
            each request preempted; ``most_running``; ``blocks``: for each step,
            pooled blocks in use and all in use.
        """
        self._numbers = {}
        self._record = {
            "schedule": [],
            "plans": [],
            "preempted": [],
            "most_running": 0,
            "blocks": [],
        }
        return self._record

    def _note(self, output: Any) -> None:
        tokens = output.num_scheduled_tokens
        for request_id in tokens:
            self._numbers.setdefault(request_id, len(self._numbers))
        record = self._record
        if tokens:  # Pie pauses for rows of its pool that are on their way.
            record["schedule"].append([[self._numbers[r], count] for r, count in tokens.items()])
        orders = getattr(output, "pie", None)
        record["plans"].append(orders.plan if orders else None)
        record["most_running"] = max(record["most_running"], len(tokens))
        manager = self._scheduler.kv_cache_manager
        residency = getattr(manager, "residency", None)
        if residency is not None:
            residency.check_integrity()
            used = round(manager.block_pool.get_usage() * (manager.block_pool.num_gpu_blocks - 1))
            record["blocks"].append([residency.pooled_in_use, used])


def copy_bytes(plans: list[Any], counters: dict[str, Any]) -> dict[str, Any]:
    """What the engine must have counted for these plans.

    Computed from the plans alone: a load list of None means the one before it,
    and a step that runs no model loads nothing into the ring.
    """
    block_bytes = counters.get("page_bytes", 0) * counters.get("num_layers", 0)
    loaded = stored = gates = steps = relabelled = 0
    loads = NO_RUNS
    for plan in plans:
        if plan is None:
            continue
        steps += 1
        if plan.loads is not None:
            loads = plan.loads
        stored += num_copied(plan.stores)
        loaded += num_copied(plan.promotions)
        relabelled += sum(len(relabel.blocks) for relabel in plan.relabels)
        if plan.forward:
            loaded += num_copied(loads)
            gates += counters["num_layers"]
    return {
        "implied": {
            "bytes_loaded": loaded * block_bytes,
            "bytes_stored": stored * block_bytes,
            "gates": gates,
            "steps": steps,
        },
        "relabelled": relabelled,
    }

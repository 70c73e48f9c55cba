"""vLLM on a CPU with several ranks, on some of which copies fail."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.helpers.failing_engine import FailingPlans, Order

SWITCH = "PIE_TEST_FAILING_RANKS"


def environment(orders: dict[int, list[Order]], *, heard: bool = True) -> dict[str, str]:
    """Of a process that is to call ``enable``.

    Args:
        orders: by rank, copies that fail.
        heard: whether the ranks hear of each other's failures, as they must.
    """
    return {SWITCH: json.dumps({"orders": orders, "heard": heard})}


def enable() -> None:
    """Make vLLM take its worker from here, if this process was asked to."""
    if not os.environ.get(SWITCH):
        return
    from pie_vllm.vllm import args

    args.WORKERS["cpu"] = "tests.helpers.failing_ranks.FailingWorker"


def __getattr__(name: str) -> Any:
    """The worker's class, made when a process asks for it: vLLM is not imported before."""
    if name != "FailingWorker":
        raise AttributeError(name)
    worker = globals()[name] = _worker_class()
    return worker


def _worker_class() -> type:
    from pie_vllm.vllm.worker_side.cpu_worker import PieCPUWorker
    from pie_vllm.vllm.worker_side.step_board import StepBoard

    faults = json.loads(os.environ[SWITCH])
    if not faults["heard"]:
        StepBoard.failure = lambda *_: ""  # type: ignore[method-assign]

    class FailingWorker(PieCPUWorker):
        """Pie's worker for CPUs."""

        def initialize_from_config(self, kv_cache_config: Any) -> None:
            super().initialize_from_config(kv_cache_config)
            self.failing = FailingPlans()
            self.failing.orders = [(*o,) for o in faults["orders"].get(str(self.rank), ())]

        def execute_model(self, scheduler_output: Any) -> Any:
            orders = getattr(scheduler_output, "pie", None)
            if orders is not None and self.pie is not None:
                self.failing.look(orders.plan, self.pie._engine)
            return super().execute_model(scheduler_output)

    return FailingWorker

"""Copies of a real engine that fail in steps of one's choice."""

from __future__ import annotations

from typing import Any

Order = tuple[str, int, str, int]
"""Part of a plan, steps to pass over, direction, number of the copy.

In the step whose plan has ``stores``, ``promotions`` or ``loads``, after so many such steps, the
copy of that number to the CPU (``store``) or from it (``load``) fails.
"""


class FailingPlans:
    """Has copies of one transfer engine fail, over the host driver. Orders follow each other."""

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def look(self, plan: Any, engine: Any) -> None:
        """At the plan of the step that the engine carries out next."""
        from tests.helpers.streams import inject

        if not self.orders:
            return
        part, wait, direction, nth = self.orders[0]
        runs = None if plan is None else getattr(plan, part)
        if runs is None or not len(runs):
            return
        if wait:
            self.orders[0] = (part, wait - 1, direction, nth)
            return
        self.orders.pop(0)
        inject(engine, "fail", direction=direction, nth=nth)


class FailingCopies:
    """Has copies of an engine core in this process fail, with its one worker in it."""

    def __init__(self, core: Any) -> None:
        """Nothing fails."""
        self._core = core
        self._plans = FailingPlans()
        scheduler = core.scheduler
        schedule = scheduler.schedule

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if self._plans.orders:
                worker = core.model_executor.driver_worker.worker
                self._plans.look(output.pie.plan, worker.pie._engine)
            return output

        scheduler.schedule = scheduled

    def order(self, orders: list[Order]) -> None:
        """Have these fail next.

        Raises:
            AssertionError: earlier ones did not come about.
        """
        assert not self._plans.orders, f"no step had {self._plans.orders[0]}"
        self._plans.orders = [(*order,) for order in orders]

    def failed(self) -> int:
        """Steps in which copies failed so far."""
        recovery = getattr(self._core.scheduler, "pie_recovery", None)
        return recovery.failures if recovery else 0

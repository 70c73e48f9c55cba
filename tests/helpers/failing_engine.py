"""Copies of a real engine that fail in steps of one's choice."""

from __future__ import annotations

from typing import Any


class FailingCopies:
    """Has copies of pie's transfer engine fail, over the host driver.

    An order is (part of a plan, steps to pass over, direction, number of the copy): in the step
    whose plan has ``stores``, ``promotions`` or ``loads``, after so many such steps, the copy
    of that number to the CPU (``store``) or from it (``load``) fails. Orders follow each other.
    """

    def __init__(self, core: Any) -> None:
        """Nothing fails."""
        self._core = core
        self._orders: list[tuple[str, int, str, int]] = []
        scheduler = core.scheduler
        schedule = scheduler.schedule

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if self._orders:
                self._look(output.pie_plan)
            return output

        scheduler.schedule = scheduled

    def order(self, orders: list[tuple[str, int, str, int]]) -> None:
        """Have these fail next.

        Raises:
            AssertionError: earlier ones did not come about.
        """
        assert not self._orders, f"no step had {self._orders[0]}"
        self._orders = [(*order,) for order in orders]

    def failed(self) -> int:
        """Steps in which copies failed so far."""
        recovery = getattr(self._core.scheduler, "pie_recovery", None)
        return recovery.failures if recovery else 0

    def _look(self, plan: Any) -> None:
        from tests.helpers.streams import inject

        part, wait, direction, nth = self._orders[0]
        if plan is None or not getattr(plan, part):
            return
        if wait:
            self._orders[0] = (part, wait - 1, direction, nth)
            return
        self._orders.pop(0)
        worker = self._core.model_executor.driver_worker.worker
        inject(worker.pie._engine, "fail", direction=direction, nth=nth)

"""Whether a scheduler gets anywhere."""

from __future__ import annotations

from tests.helpers.scheduling import Driver

MOST_IDLE = 20
"""Steps in a row that may run nothing while there are requests."""


class Progress:
    """Holds a scheduler to a bound: in so many steps one request gets further than it ever was.

    Further means that a token is computed which was never computed before, or that a request ends.
    To compute again what a preemption lost is none, so neither a deadlock nor requests that preempt
    each other for ever can pass; and of steps that run nothing there are at most ``MOST_IDLE`` in a
    row. New weights void all that was computed, and count from there.

    Attributes:
        most: steps in a row without progress that are allowed.
        most_idle: those that may run nothing.
        longest: so many there were at most.
    """

    def __init__(self, driver: Driver, most: int, most_idle: int = MOST_IDLE) -> None:
        self.most, self.most_idle = most, most_idle
        self.longest = 0
        self._driver = driver
        self._furthest: dict[str, int] = {}
        self._weights = 0
        self._since = 0
        self._steps = 0

    def look(self) -> None:
        """After a step. Raises AssertionError when the bound is broken."""
        driver = self._driver
        if driver.runner.weights != self._weights:
            self._weights = driver.runner.weights
            self._furthest.clear()
            self._since = 0
        requests = driver.scheduler.requests
        before = self._furthest
        now = {
            name: max(request.num_computed_tokens, before.get(name, 0))
            for name, request in requests.items()
        }
        further = before.keys() - now.keys() or any(now[n] > before.get(n, 0) for n in now)
        self._furthest = now
        self._since = 0 if further or not requests else self._since + driver.steps - self._steps
        self._steps = driver.steps
        self.longest = max(self.longest, self._since)
        assert driver.idle <= self.most_idle, "no progress: the scheduler runs nothing"
        assert self._since <= self.most, (
            f"no progress in {self._since} steps, {len(driver.scheduler.running)} requests running"
        )

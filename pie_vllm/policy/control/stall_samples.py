"""Stall of steps of which a GPU times only some, and reports those later."""

from __future__ import annotations

from pie_vllm.policy.control.detector import Observation

MOST_WAITING = 64
"""Maximum number of steps that wait for their stall. The engine times one step in four, but none
that runs in a FULL graph."""


class AwaitedStalls:
    """Observations that wait for their stall, by number of the step.

    Where the calling thread itself waits for copies, a step's stall comes with its report.
    Elsewhere events time one step in some, which is reported once they have passed. It stands for
    the untimed steps before it: they are assumed to have stalled equally long per byte loaded.
    """

    def __init__(self) -> None:
        """Nothing waits."""
        self._waiting: dict[int, tuple[Observation, bool]] = {}

    def __len__(self) -> int:
        """Number of steps that wait."""
        return len(self._waiting)

    def add(self, step: int, seen: Observation, within_budget: bool) -> None:
        """Note a step that ended without its stall."""
        self._waiting[step] = seen, within_budget

    def overdue(self) -> list[Observation]:
        """The oldest of more than ``MOST_WAITING`` steps, in order: their stall is not awaited."""
        waiting = self._waiting
        late = list(waiting)[: max(0, len(waiting) - MOST_WAITING)]
        return [waiting.pop(step)[0] for step in late]

    def take(self, step: int, stall_seconds: float) -> list[tuple[Observation, bool]]:
        """The observations up to that step in order, stalls put in; none if it is not known."""
        waiting = self._waiting
        if step not in waiting:
            return []
        timed, _ = waiting[step]
        share = stall_seconds / timed.bytes_loaded if timed.bytes_loaded else 0.0
        known = []
        for number in [number for number in waiting if number <= step]:
            seen, within_budget = waiting.pop(number)
            stall = stall_seconds if number == step else share * seen.bytes_loaded
            stall = min(stall, seen.seconds)
            known.append((seen._replace(stall_seconds=stall), within_budget))
        return known


def speed_of_finished(loaded: int, finished: int, seconds: float) -> float:
    """Seconds that ``loaded`` bytes took, at the speed of those that finished in ``seconds``.

    The loads of a step may finish after its end; 0, not known, where none did.
    """
    return seconds * loaded / finished if finished else 0.0

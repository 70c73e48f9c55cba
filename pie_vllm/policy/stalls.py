"""Steps whose stall is told later: on a GPU only some are timed, and known steps afterwards."""

from __future__ import annotations

from pie_vllm.policy.detector import Observation


class AwaitedStalls:
    """Observations that wait for their stall, by number of the step.

    Where the calling thread waits itself, a step's stall comes with it. Else one
    step in some is timed by events, and reported when they have passed; the steps
    before it are never known, and are forgotten with it.
    """

    def __init__(self) -> None:
        """Nothing waits."""
        self._waiting: dict[int, tuple[Observation, bool]] = {}

    def __len__(self) -> int:
        """Steps that wait."""
        return len(self._waiting)

    def add(self, step: int, seen: Observation, within_budget: bool) -> None:
        """A step that ended without its stall."""
        self._waiting[step] = seen, within_budget

    def take(self, step: int, stall_seconds: float) -> tuple[Observation, bool] | None:
        """The step's observation, its stall put in; None if it is not known here."""
        found = self._waiting.pop(step, None)
        for other in [number for number in self._waiting if number < step]:
            del self._waiting[other]
        if found is None:
            return None
        seen, within_budget = found
        return seen._replace(stall_seconds=stall_seconds), within_budget


def speed_of_finished(loaded: int, finished: int, seconds: float) -> float:
    """Seconds that ``loaded`` bytes took, at the speed of those that finished in ``seconds``.

    The loads of a step may finish after its end; 0, not known, where none did.
    """
    return seconds * loaded / finished if finished else 0.0

"""What the steps so far say: how fast the link is, how long a step takes, what it stalls."""

from __future__ import annotations

from typing import NamedTuple

WEIGHT = 0.1
"""Of the newest step in each average: half of what is known is from the last 7 steps."""


class Observation(NamedTuple):
    """One step of the engine, as a worker saw it.

    Attributes:
        tokens: scheduled in the step.
        requests: that ran in it.
        seconds: the model's forward pass took, stall included.
        stall_seconds: that it waited for KV.
        bytes_loaded: that the link brought to the device since the last observation.
        load_seconds: that the link was busy with them.
    """

    tokens: int
    requests: int
    seconds: float
    stall_seconds: float = 0.0
    bytes_loaded: int = 0
    load_seconds: float = 0.0


PRIOR_SECONDS = 0.01
"""Of loading that a bandwidth known before the first load counts for; as much outweighs it."""


class Prior(NamedTuple):
    """What is known before the first step.

    Attributes:
        bandwidth: from the CPU to the device, bytes per second; None if unknown.
        most_bandwidth: that is counted on, whatever is measured; None is without end.
    """

    bandwidth: float | None = None
    most_bandwidth: float | None = None


NOTHING = Prior()


class Detector:
    """Learns from each step; decides nothing.

    A step is taken to last ``step_seconds + slope * (tokens - requests)``: steps that only decode
    change little from one to the next, and prompt tokens come on top.

    Attributes:
        step_seconds: of a step that only decodes, with all its KV on the device; None at first.
        slope: seconds for each prompt token; 0 while unknown.
        stall_share: stall of recent steps that loaded, as a share of the rest of the step.
    """

    def __init__(self, prior: Prior = NOTHING) -> None:
        """Nothing is known but the prior."""
        self.step_seconds: float | None = None
        self.slope = 0.0
        self.stall_share = 0.0
        self._busy = 0.0 if prior.bandwidth is None else PRIOR_SECONDS
        self._bytes = (prior.bandwidth or 0.0) * self._busy
        self._most = prior.most_bandwidth

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second to the device that can be counted on; None while unknown.

        Those of the link while it is busy, and no more than the prior's most.
        """
        if self._busy <= 0:
            return None
        measured = self._bytes / self._busy
        return measured if self._most is None or measured < self._most else self._most

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn from a step.

        Args:
            seen: the step.
            within_budget: whether its loads were meant to hide; others tell nothing of the stall.
        """
        compute = max(seen.seconds - seen.stall_seconds, 0.0)
        if seen.tokens > 0 and compute > 0:
            self._learn(compute, seen.tokens - seen.requests)
        if seen.load_seconds > 0:
            keep = 1 - WEIGHT
            self._bytes = keep * self._bytes + seen.bytes_loaded
            self._busy = keep * self._busy + seen.load_seconds
        if seen.bytes_loaded and within_budget and compute > 0:
            self.stall_share = _towards(self.stall_share, seen.stall_seconds / compute)

    def forget_stall(self) -> None:
        """Begin the average of the stall anew."""
        self.stall_share = 0.0

    def _learn(self, compute: float, prompt_tokens: int) -> None:
        if prompt_tokens <= 0:
            known = self.step_seconds
            self.step_seconds = compute if known is None else _towards(known, compute)
            return
        slope = max(compute - (self.step_seconds or 0.0), 0.0) / prompt_tokens
        self.slope = _towards(self.slope, slope) if self.slope else slope


def _towards(average: float, value: float) -> float:
    return average + WEIGHT * (value - average)

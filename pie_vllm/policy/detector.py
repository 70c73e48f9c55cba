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
        step_seconds: of a step that only decodes; None if unknown. The first such step replaces it.
    """

    bandwidth: float | None = None
    most_bandwidth: float | None = None
    step_seconds: float | None = None


NOTHING = Prior()


class Detector:
    """Learns from each step; decides nothing.

    A step is taken to last ``step_seconds + slope * (tokens - requests)``: steps that only decode
    change little from one to the next, and prompt tokens come on top.

    Attributes:
        step_seconds: of a step that only decodes with all its KV on the device; None if unknown.
        slope: seconds for each prompt token; 0 while unknown.
        bandwidth: bytes per second to the device that can be counted on, None while unknown: those
            of the link while it is busy, and no more than the prior's most.
        stall_share: stall of recent steps that loaded, as a share of the rest of the step.
    """

    def __init__(self, prior: Prior = NOTHING) -> None:
        """Nothing is known but the prior."""
        self.step_seconds = prior.step_seconds
        self._guessed = True
        self.slope = 0.0
        self.stall_share = 0.0
        self._busy = 0.0 if prior.bandwidth is None else PRIOR_SECONDS
        self._bytes = (prior.bandwidth or 0.0) * self._busy
        self._most = prior.most_bandwidth
        self.bandwidth = None if prior.bandwidth is None else self._limited()

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn from a step.

        Args:
            seen: the step.
            within_budget: whether its loads were meant to hide; others tell nothing of the stall.
        """
        tokens, requests, seconds, stall, loaded, busy = seen
        compute = seconds - stall
        if compute > 0:
            if tokens > requests:
                self._learn_prompts(compute, tokens - requests)
            elif tokens:
                known = self.step_seconds
                if known is None or self._guessed:
                    self.step_seconds, self._guessed = compute, False
                else:
                    self.step_seconds = known + WEIGHT * (compute - known)
            if loaded and within_budget:
                self.stall_share += WEIGHT * (stall / compute - self.stall_share)
        if busy > 0:
            keep = 1 - WEIGHT
            self._bytes = keep * self._bytes + loaded
            self._busy = keep * self._busy + busy
            self.bandwidth = self._limited()

    def forget_stall(self) -> None:
        """Begin the average of the stall anew."""
        self.stall_share = 0.0

    def _limited(self) -> float:
        measured = self._bytes / self._busy
        return measured if self._most is None or measured < self._most else self._most

    def _learn_prompts(self, compute: float, prompt_tokens: int) -> None:
        slope = max(compute - (self.step_seconds or 0.0), 0.0) / prompt_tokens
        self.slope += (WEIGHT if self.slope else 1.0) * (slope - self.slope)

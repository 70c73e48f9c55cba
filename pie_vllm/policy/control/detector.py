"""What the steps so far say: how fast the link is, how long a step takes, what it stalls."""

from __future__ import annotations

from typing import NamedTuple

from pie_vllm.plan import Prior
from pie_vllm.policy.control.step_time_model import FREE, LoadCost, StepModel

WEIGHT = 0.1
"""Weight of the newest step in each average; the last 7 steps make up half of it."""


class Observation(NamedTuple):
    """One step of the engine, as a worker saw it.

    Attributes:
        tokens: scheduled in the step.
        requests: that ran in it, and draft tokens that it verified for them: a step's time goes by
            the tokens that it computes, whoever they are of.
        seconds: the model's forward pass took, stall included.
        stall_seconds: that it waited for KV.
        bytes_loaded: that the link brought to the device since the last observation.
        load_seconds: that the link was busy with them.
        blocks: of KV that the requests of the step hold, about.
        restored: whether some of the bytes were parked KV for requests that just came.
    """

    tokens: int
    requests: int
    seconds: float
    stall_seconds: float = 0.0
    bytes_loaded: int = 0
    load_seconds: float = 0.0
    blocks: int = 0
    restored: bool = False


PRIOR_SECONDS = 0.01
"""Seconds of loading that a bandwidth known before the first load counts for; observed loads
outweigh it after as many."""

PLAUSIBLE_BANDWIDTH = 1e10
"""Bandwidth in bytes per second that serves as the unit of load costs where the link was not
measured at start."""


NOTHING = Prior()


class Detector:
    """Learns from each step; decides nothing.

    A step that only decodes is predicted by ``StepModel``, from the requests and blocks of the last
    step; prompt tokens come on top, ``slope`` seconds each.

    Attributes:
        step_seconds: of a step that only decodes, as the last one but with all its KV on the
            device; None if unknown.
        slope: seconds for each prompt token; 0 while unknown.
        bandwidth: bytes per second to the device that can be counted on, None while unknown: those
            of the link while it is busy, and no more than the prior's most.
        stall_share: stall of recent steps that loaded, as a share of the rest of the step.
        cost: what loads cost the compute beside them, at least (``StepModel.sure_cost``).
        streaming_seconds: of all steps that loaded.
        slowed_seconds: by which loads slowed the compute of these steps, most likely.
    """

    def __init__(self, prior: Prior = NOTHING) -> None:
        """Nothing is known but the prior."""
        self.step_seconds = prior.step_seconds
        self._prior = prior
        self._model: StepModel | None = None
        self._requests = 0  # Of the step that ``step_seconds`` is of.
        self.slope = prior.prompt_seconds
        self.stall_share = 0.0
        self.streaming_seconds = self.slowed_seconds = 0.0
        self._busy = 0.0 if prior.bandwidth is None else PRIOR_SECONDS
        self._bytes = (prior.bandwidth or 0.0) * self._busy
        self._most = prior.most_bandwidth
        self.bandwidth = None if prior.bandwidth is None else self._limited()

    @property
    def cost(self) -> LoadCost:
        """As the class says; nothing while unknown."""
        return FREE if self._model is None else self._model.sure_cost

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn from a step.

        Args:
            seen: the step.
            within_budget: whether its loads were meant to hide; others tell nothing of the stall.
        """
        tokens, requests, seconds, stall, loaded, busy, blocks, restored = seen
        compute = seconds - stall
        if compute > 0:
            model = self._model
            decodes = 0 < tokens == requests
            if model is not None:
                known = decodes and not restored
                learnt = known and model.learn(requests, blocks, loaded, compute)
                if learnt or requests != self._requests:
                    self.step_seconds = model.seconds(requests, blocks)
                    self._requests = requests
            elif decodes:
                self._begin(requests, blocks, compute)
            if tokens > requests:
                self._learn_prompts(compute, tokens - requests)
            if loaded:
                self.streaming_seconds += seconds
                if model is not None:
                    self.slowed_seconds += model.cost.seconds(loaded)
                if within_budget:
                    self.stall_share += WEIGHT * (stall / compute - self.stall_share)
        if busy > 0:
            keep = 1 - WEIGHT
            self._bytes = keep * self._bytes + loaded
            self._busy = keep * self._busy + busy
            self.bandwidth = self._limited()

    def _begin(self, requests: int, blocks: int, compute: float) -> None:
        prior = self._prior
        unit = self.bandwidth or PLAUSIBLE_BANDWIDTH
        self._requests = requests
        self._model = StepModel(requests, blocks, unit, compute, prior.request_seconds)
        self.step_seconds = compute

    def forget_stall(self) -> None:
        """Begin the average of the stall anew."""
        self.stall_share = 0.0

    def _limited(self) -> float:
        measured = self._bytes / self._busy
        return measured if self._most is None or measured < self._most else self._most

    def _learn_prompts(self, compute: float, prompt_tokens: int) -> None:
        slope = max(compute - (self.step_seconds or 0.0), 0.0) / prompt_tokens
        self.slope += (WEIGHT if self.slope else 1.0) * (slope - self.slope)

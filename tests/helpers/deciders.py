"""Decisions by script, in place of what the decider learns from real steps."""

from __future__ import annotations

import random
from typing import Any

from pie_vllm.policy.decider import Decision
from pie_vllm.policy.detector import Detector


class Fixed:
    """The same decision in every step."""

    def __init__(self, budget: int, limit: int, spare: int = 0) -> None:
        self._decision = Decision(budget, limit, spare)
        self.detector = Detector()

    def decide(self, prompt_tokens: int = 0) -> Decision:  # noqa: ARG002
        return self._decision

    def observe(self, *_: Any, **__: Any) -> None:
        """Learns nothing."""


class Wavering(Fixed):
    """Another random decision every few steps, as with a link whose speed changes."""

    def __init__(self, window: int, seed: int) -> None:
        super().__init__(window, window)
        self._window = window
        self._rng = random.Random(seed)

    def decide(self, prompt_tokens: int = 0) -> Decision:
        if self._rng.random() < 0.2:
            budget, limit, spare = (self._rng.randint(0, self._window) for _ in range(3))
            self._decision = Decision(budget, limit, self._rng.choice([0, spare]))
        return super().decide(prompt_tokens)

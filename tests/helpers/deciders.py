"""Decisions by script, in place of what the decider learns from real steps."""

from __future__ import annotations

import random
from typing import Any

from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.control.detector import Detector
from pie_vllm.simulation.traces import Static


class Fixed(Static):
    """The same decision in every step, for vLLM's scheduler, which reports what is detected."""

    def __init__(
        self, limit: int, budget: int | None = None, spare: int = 0, **parking: Any
    ) -> None:
        """``parking``: fields of ``Decision`` about it."""
        super().__init__(limit, budget, spare)
        self._decision = self._decision._replace(**parking)
        self.detector = Detector()


class Wavering(Fixed):
    """Another random decision every few steps, as with a link whose speed changes."""

    def __init__(self, window: int, seed: int) -> None:
        super().__init__(window)
        self._window = window
        self._rng = random.Random(seed)

    def decide(self, prompt_tokens: int = 0) -> Decision:
        if self._rng.random() < 0.2:
            budget, limit, spare, most = (self._rng.randint(0, self._window) for _ in range(4))
            choice = self._rng.choice
            # What parks little and restores nothing is a link slower than computing again.
            self._decision = Decision(
                budget,
                limit,
                choice([0, spare]),
                choice([None, most]),
                park_blocks_max=choice([None, 1, 4]),
                restore_enabled=self._rng.random() < 0.8,
                store_ahead_max=choice([0, 1, 100]),
                restore_blocks_max=choice([None, 0, 1, 2]),
            )
        return super().decide(prompt_tokens)

"""Made-up drafts for the runner of tags: some are accepted, the others are written over."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from pie_vllm.policy.placement.completed_blocks import CompletedBlocks
from pie_vllm.policy.speculation import DraftsInFlight

REJECTED = -1
"""A draft that is never accepted, as vLLM pads requests with."""


class Drafting(NamedTuple):
    """How the runner drafts.

    Attributes:
        tokens: drafts of a request in a step, at most.
        lookahead: slots behind a step's tokens that a drafter writes to.
        asynchronous: whether drafts never leave the runner, which corrects the positions of a step
            by what the step before accepted.
        chance: that a draft is right, if the one before it was.
        rng: for all that happens.
    """

    tokens: int
    lookahead: int
    asynchronous: bool
    chance: float
    rng: random.Random

    def right(self, most: int) -> int:
        """Number of right drafts among so many."""
        count = 0
        while count < most and self.rng.random() < self.chance:
            count += 1
        return count

    def proposed(self, following: Sequence[int]) -> list[int]:
        """Drafts for a request, of which the first ones are those that follow."""
        count = self.rng.randint(0, self.tokens)
        right = self.right(min(count, len(following)))
        return [*following[:right], *[REJECTED] * (count - right)]


def accepted(drafts: Sequence[int], following: Sequence[int]) -> int:
    """Number of drafts that are accepted: those that follow, up to the first that does not."""
    count = 0
    for draft, token in zip(drafts, following, strict=False):
        if draft != token:
            break
        count += 1
    return count


def hasty_blocks() -> Callable[[], None]:
    """Count all tokens of a step as computed when it is scheduled, rejected drafts among them.

    Returns:
        What ends this.
    """
    next_step = CompletedBlocks.next_step

    def hasty(self: CompletedBlocks, requests: Any, _: Any, fresh: Any) -> None:
        names = [name for name in self._holders if name in requests and name not in fresh]
        next_step(self, requests, names, fresh)

    patch = pytest.MonkeyPatch()
    patch.setattr(CompletedBlocks, "next_step", hasty)
    patch.setattr(DraftsInFlight, "uncertain", lambda *_: 0)
    return patch.undo

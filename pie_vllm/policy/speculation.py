"""Speculative decoding: how many tokens a step verifies, and which of them count as computed.

A scheduler counts the tokens of a step as computed when it schedules them, draft tokens included,
and takes back the rejected ones when the results are there. Their positions are written again by
a later step, so a block is complete only without them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sized
from typing import NamedTuple

from pie_vllm.geometry import cdiv
from pie_vllm.policy.block import RequestId


class Speculation(NamedTuple):
    """Sizes of a server's speculation; by default there is none.

    Attributes:
        drafts: Maximum number of draft tokens that a step verifies for each request.
        lookahead: Number of tokens behind those of a step for which a request has slots, too.
        rewritten: Number of accepted tokens, the newest ones, whose KV a drafter writes again.
    """

    drafts: int = 0
    lookahead: int = 0
    rewritten: int = 0

    @property
    def tokens_max(self) -> int:
        """Maximum number of tokens that a step computes for a request that decodes."""
        return 1 + self.drafts

    def blocks_max(self, block_size: int) -> int:
        """Maximum number of new blocks that a request takes for a step in which it decodes."""
        return cdiv(self.tokens_max + self.lookahead, block_size)


NO_SPECULATION = Speculation()


class DraftsInFlight:
    """Draft tokens of steps whose results are not there yet: each may be rejected.

    The other tokens of such steps are certain, the first one of each request included, because
    it was sampled by the target.
    """

    def __init__(self, rewritten: int = 0) -> None:
        """Start with no step in flight; ``rewritten`` is ``Speculation.rewritten``."""
        self._rewritten = rewritten
        self._steps: deque[tuple[object, dict[RequestId, int]]] = deque()
        self._drafts: dict[RequestId, int] = {}

    @property
    def by_request(self) -> dict[RequestId, int]:
        """Number of draft tokens of each request that has any, as of now."""
        return dict(self._drafts)

    def of_step(self, token: object) -> int:
        """Number of draft tokens of a step in flight; 0 if it is not known."""
        return next((sum(counts.values()) for step, counts in self._steps if step is token), 0)

    def uncertain(self, request_id: RequestId) -> int:
        """Number of a request's computed tokens, the last ones, that may be written again."""
        return self._drafts.get(request_id, 0) + self._rewritten

    def submitted(self, token: object, drafts: Mapping[RequestId, Sized]) -> int:
        """A step goes to the workers.

        Args:
            token: Object that stands for the step.
            drafts: Draft tokens of its requests, by id.

        Returns:
            Number of these.
        """
        counts = {name: len(tokens) for name, tokens in drafts.items()}
        self._steps.append((token, counts))
        known = self._drafts
        for name, count in counts.items():
            known[name] = known.get(name, 0) + count
        return sum(counts.values())

    def landed(self, token: object) -> None:
        """The results of a step are about to be taken, and with them its rejections."""
        if not any(step is token for step, _ in self._steps):
            return
        while True:  # Steps before it whose results never came have none to come.
            step, counts = self._steps.popleft()
            for name, count in counts.items():
                left = self._drafts[name] - count
                if left:
                    self._drafts[name] = left
                else:
                    del self._drafts[name]
            if step is token:
                return

    def clear(self) -> None:
        """No result of any step will come any more."""
        self._steps.clear()
        self._drafts.clear()

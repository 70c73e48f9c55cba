"""Which blocks are complete after a step, without asking every request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from pie_vllm.policy.residency import Residency
from pie_vllm.policy.victims import Holder


class Progress(Protocol):
    """What the policy needs of vLLM's ``Request``."""

    num_computed_tokens: int


class Completions:
    """Tells the residency of complete blocks, in the step that completes them.

    A request computes one token a step or is left out, unless it works on its
    prompt; so a block that lacks ``k`` tokens is not complete for ``k - 1``
    steps, and nobody need look at its request before.
    """

    def __init__(self, block_size: int, residency: Residency) -> None:
        """Start before the first step."""
        self._block_size = block_size
        self._residency = residency
        self._step = 0
        self._on: dict[int, list[Holder]] = {}

    def next_step(
        self, requests: Mapping[str, Any], several: Collection[str], fresh: Collection[str]
    ) -> None:
        """Go on by one step, and note the blocks that are complete after it.

        Args:
            requests: Progress by id, of all requests that hold blocks.
            several: those that compute more than one token in this step.
            fresh: those that got their first blocks in this step.
        """
        self._step = step = self._step + 1
        for request_id in several:
            self._note(request_id, requests[request_id], self._residency.computed)
        due = self._on.pop(step, None)
        if due is not None:
            residency, size = self._residency, self._block_size
            ended, newly = residency.victims.tails_completed(due, step, size, self._expect)
            residency.queue.demotable += newly
            if ended:
                self._on.setdefault(step + size, []).extend(ended)
        for request_id in fresh:
            self._note(request_id, requests[request_id], self._residency.computed_again)

    def _note(
        self, request_id: str, request: Progress, computed: Callable[[str, int], None]
    ) -> None:
        tokens = request.num_computed_tokens
        computed(request_id, tokens // self._block_size)
        holder = self._residency.victims.holders[request_id]
        holder.progress, holder.table = request, self._residency.tables[request_id]
        self._expect(holder, tokens)

    def _expect(self, holder: Holder, tokens: int) -> None:
        due = self._step + self._block_size - tokens % self._block_size
        if holder.due != due:
            holder.due = due
            self._on.setdefault(due, []).append(holder)

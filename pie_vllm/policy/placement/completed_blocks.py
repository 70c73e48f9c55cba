"""Blocks whose KV is complete, found out when somebody wants to know."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from pie_vllm.geometry import cdiv
from pie_vllm.policy.block import RequestId
from pie_vllm.policy.placement.interfaces import Progress
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.policy.placement.victims import Holder
from pie_vllm.policy.speculation import DraftsInFlight


class CompletedBlocks:
    """Tells the residency of complete blocks, before it demotes or refuses anything.

    Between two looks the residency knows of fewer complete blocks than there
    are: it counts on less, never on more, and a step with enough free blocks
    costs nothing here. A look asks only requests whose last block can be
    complete: they compute one token a step or are left out, unless they work
    on their prompt, so a block that lacks ``k`` tokens is not complete for
    ``k - 1`` steps. With speculation they compute up to ``tokens_max`` tokens a
    step, and draft tokens count only once they are accepted.
    """

    def __init__(
        self,
        block_size: int,
        residency: Residency,
        drafts: DraftsInFlight | None = None,
        tokens_max: int = 1,
    ) -> None:
        """Start before the first step; ``residency`` asks here before it demotes.

        Args:
            block_size: Tokens of a block.
            residency: Is told of complete blocks.
            drafts: Draft tokens of the steps in flight; None if there never are any.
            tokens_max: Maximum number of tokens that a step computes for a request that decodes.
        """
        self._block_size = block_size
        self._residency = residency
        self._drafts = DraftsInFlight() if drafts is None else drafts
        self._tokens_max = tokens_max
        self._holders = residency.victims.holders
        self._step = 0
        self._looked = 0
        residency.catch_up = self.catch_up

    def next_step(
        self,
        requests: Mapping[RequestId, Progress],
        several: Collection[RequestId],
        fresh: Collection[RequestId],
    ) -> None:
        """Go on by one step, once its tokens are counted as computed.

        Args:
            requests: All requests that hold blocks, by id.
            several: Requests that compute more than ``tokens_max`` tokens in this step.
            fresh: Requests that got their first blocks in this step.
        """
        self._step += 1
        for request_id in several:
            self._note(self._holders[request_id], self._residency.computed)
        for request_id in fresh:
            holder = self._holders[request_id]
            holder.progress = requests[request_id]
            self._note(holder, self._residency.computed_again)

    def pass_step(self) -> None:
        """Go on by a step of at most ``tokens_max`` tokens of each request, and of no first one."""
        self._step += 1

    def catch_up(self) -> None:
        """Tell of all blocks that are complete after the last step."""
        step = self._step
        if self._looked == step:
            return
        self._looked = step
        computed = self._residency.computed
        for holder in self._holders.values():
            if holder.due <= step:
                self._note(holder, computed)

    def _note(self, holder: Holder, tell: Callable[[RequestId, int], None]) -> None:
        assert holder.progress is not None
        size, uncertain = self._block_size, self._drafts.uncertain(holder.request_id)
        full, begun = divmod(max(holder.progress.num_computed_tokens - uncertain, 0), size)
        tell(holder.request_id, full)
        # Uncertain tokens may all be accepted before the next step.
        holder.due = self._step + max(cdiv(size - begun - uncertain, self._tokens_max), 0)

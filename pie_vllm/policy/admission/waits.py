"""What keeps the head of the queue waiting, by name."""

from __future__ import annotations

from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue

REASONS = {
    "link": "the link cannot feed more pooled blocks",
    "rows": "CPU memory for more pooled blocks is not there",
    "window": "the blocks of both tiers are in use",
    "residents": "blocks that are being written fill the device's memory",
    "watermark": "--watermark keeps blocks free",
    "restore": "its KV is copied back first, or waits for the room",
    "seqs": "--max-num-seqs requests run",
    "tokens": "the step has --max-num-batched-tokens tokens",
    "preemption": "a running request was preempted in the step",
    "deferred": "vLLM defers it: for an adapter, a grammar, or input to come",
}
"""Reason: what it means."""


def short_of(queue: TieredFreeBlockQueue, wanted: int, within: int | None = None) -> str:
    """Why so many blocks of both tiers together are not to be had.

    Args:
        queue: the free blocks.
        wanted: blocks of the request's whole sequence.
        within: free blocks within the admission limit; None is without one.
    """
    if wanted > queue.free_in_all:
        return "window"
    if wanted > queue.available_in_all:
        return "rows"
    return "watermark" if within is not None and wanted <= within else "link"


def short_at_once(queue: TieredFreeBlockQueue, wanted: int) -> str:
    """Why so many blocks are not to be had in this step.

    Args:
        queue: the free blocks, on the terms of the request's admission.
        wanted: new blocks, and idle ones that were found.
    """
    if wanted > queue.available_in_all:
        return short_of(queue, wanted)
    return "link" if queue.frozen else "residents"


class Patience:
    """How long requests have waited for their own parked KV, while others run.

    A copy back in parts brings at least one block a step, and a block that was stored in a step
    can be copied back in the next. So who waits for longer than it has blocks loses them again as
    fast as they come, and is admitted with what there is: the rest is copied at once, or computed.
    """

    def __init__(self) -> None:
        """Nobody has waited."""
        self._steps: dict[str, int] = {}

    def waits(self, request_id: str, blocks: int) -> bool:
        """Whether a request of so many blocks may wait for one step more."""
        return self._steps.get(request_id, 0) < blocks

    def wait(self, request_id: str, blocks: int) -> bool:
        """Whether a request of so many blocks may wait in this step, too; counts it if so."""
        if not self.waits(request_id, blocks):
            return False
        self._steps[request_id] = self._steps.get(request_id, 0) + 1
        return True

    def forget(self, request_id: str) -> None:
        """A request was admitted, or has ended."""
        self._steps.pop(request_id, None)


class HeadWaits:
    """Steps in which the head of the waiting queue was passed over.

    Attributes:
        steps: by reason, since the start.
    """

    def __init__(self) -> None:
        """Nobody has waited."""
        self.steps = dict.fromkeys(REASONS, 0)
        self._told: dict[str, int] = {}

    def count(self, reason: str) -> None:
        """The head was passed over in a step."""
        self.steps[reason] += 1

    def news(self) -> str:
        """Reasons and steps since the last call, the most frequent first."""
        told, self._told = self._told, dict(self.steps)
        new = {reason: count - told.get(reason, 0) for reason, count in self.steps.items()}
        order = sorted((r for r, count in new.items() if count), key=new.__getitem__, reverse=True)
        return ",".join(f"{reason}:{new[reason]}" for reason in order) or "none"

"""Blocks whose KV is stored before their pages are wanted, while the link has time."""

from __future__ import annotations

from typing import NamedTuple

from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.policy.pool.parked_kv import Parking

REQUEST_BLOCKS = 4
"""Number of blocks stored ahead for each running request, which it fills by decoding."""

DEPTH_MAX = 256
"""Maximum number of free residents examined in a step; each costs less than a microsecond."""

LOOK_STEPS = 16
"""Number of steps from one look to the next while steps compute no prompts."""


class Ahead(NamedTuple):
    """What a step may store ahead of eviction.

    Attributes:
        blocks_max: Maximum number of blocks stored, within the step's allowance for parking.
        running: Number of requests that run.
        chunk_blocks: Number of blocks that a step may fill with prompt tokens.
        prompts: Whether the step computes prompts. If it does not and copies nothing else, it
            stores nothing ahead either, because it may run in a FULL graph.
    """

    blocks_max: int
    running: int
    chunk_blocks: int
    prompts: bool

    @classmethod
    def of(
        cls, decision: Decision, turns: bool, running: int, chunk_blocks: int, prompts: bool
    ) -> Ahead | None:
        """What a decision allows; None while requests take ``turns``: they need the link."""
        if turns or not decision.store_ahead_max:
            return None
        return cls(decision.store_ahead_max, running, chunk_blocks, prompts)


def store_ahead(queue: TieredFreeBlockQueue, parking: Parking, ahead: Ahead) -> None:
    """Park cached residents that nobody uses and that are evicted next; they keep their pages.

    Their eviction then costs no store: a step that only decodes and needs such a page has nothing
    to copy. The stores are among those of the step that is planned, which are done before a later
    step writes to a page.
    """
    blocks_left, wanted = ahead.blocks_max, parking.wanted
    depth = min(ahead.chunk_blocks + REQUEST_BLOCKS * ahead.running, DEPTH_MAX)
    for block in queue.next_reused(depth):
        if blocks_left <= 0:
            return
        key = block.block_hash
        worth = key is not None and (wanted is None or key in wanted)
        if worth and not parking.parked(key):
            if not parking.keep(block):
                return
            parking.ahead_blocks += 1
            blocks_left -= 1

"""Which KV is stored before its block is wanted, while the link has time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pie_vllm.policy.control.decider import Decision
    from pie_vllm.policy.placement.residency import Residency


BLOCKS_EACH = 4
"""That are stored ahead for each running request: it takes them in as many blocks' tokens."""

MOST_DEPTH = 256
"""Of free residents that are looked at; a look at each takes less than a microsecond."""

LOOK_STEPS = 16
"""Between looks while steps compute no prompts."""


class Ahead(NamedTuple):
    """What a step may store ahead of eviction.

    Attributes:
        most: blocks, within the step's allowance for parking.
        running: requests that run.
        chunk_blocks: blocks that a step may fill with prompt tokens.
        prompts: whether the step computes prompts. If not, it is left as it is where it copies
            nothing else, because it may run in a FULL graph.
    """

    most: int
    running: int
    chunk_blocks: int
    prompts: bool

    @classmethod
    def of(
        cls, decision: Decision, turns: bool, running: int, chunk_blocks: int, prompts: bool
    ) -> Ahead | None:
        """What a decision allows; nothing while requests take ``turns``, who need the link."""
        if turns or not decision.store_ahead_max:
            return None
        return cls(decision.store_ahead_max, running, chunk_blocks, prompts)


def write_through(residency: Residency, ahead: Ahead) -> None:
    """Park cached residents that nobody uses and that are evicted next; they keep their pages.

    Their eviction then costs no store: a step that only decodes and needs such a page has nothing
    to copy. The stores are among those of the step that is planned, which are done before a later
    step writes to a page.
    """
    parking, most = residency.parking, ahead.most
    depth = min(ahead.chunk_blocks + BLOCKS_EACH * ahead.running, MOST_DEPTH)
    for block in residency.queue.next_reused(depth):
        if most <= 0:
            return
        if block.block_hash is not None and not parking.parked(block.block_hash):
            if not parking.keep(block):
                return
            parking.ahead_blocks += 1
            most -= 1

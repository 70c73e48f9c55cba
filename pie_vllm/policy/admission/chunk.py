"""How many tokens a step may compute, decided before each step.

A block that is being written stays resident, so the new blocks of a step must find resident
pages: free ones, or ones whose blocks can be demoted for them. Between steps a running request
holds one page that is not full, or asks for one at the end of a block, and no more: all other
pages can be had. So ``n`` running requests and a prompt's chunk go together while ``n`` is below
the residents, and nothing has to be kept for chunks to come but one block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pie_vllm.geometry import cdiv
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue

PROMPT_RESERVE = 1
"""Number of residents that waiting requests leave to prompts under way, which get on with one."""


class Runs(NamedTuple):
    """A running request as the coming step meets it.

    Attributes:
        computed: tokens whose KV it has.
        left: tokens that it has and whose KV is still to be computed, at least 1.
        prompt: whether these are more than the one that it sampled last.
        out: whether it is left out of the step.
    """

    computed: int
    left: int
    prompt: bool
    out: bool


class Asked(NamedTuple):
    """What running requests ask of a step.

    Attributes:
        decodes: requests that compute one token.
        due: blocks that these need.
        behind: decodes that come after the first prompt, which is served before them.
        prompts: tokens computed and tokens left of each request that works on its prompt.
        tails: requests left out of the step at the end of a block; each needs one when it is back.
    """

    decodes: int = 0
    due: int = 0
    behind: int = 0
    prompts: tuple[tuple[int, int], ...] = ()
    tails: int = 0

    @classmethod
    def of(cls, running: Iterable[tuple[int, int, bool, bool]], block_size: int) -> Asked:
        """Count over the running requests, each as ``Runs``, in the order they are served in."""
        decodes = due = behind = tails = 0
        prompts: list[tuple[int, int]] = []
        for computed, left, prompt, out in running:
            at_end = computed % block_size == 0
            if out:
                tails += at_end
            elif prompt:
                prompts.append((computed, left))
            else:
                decodes += 1
                due += at_end
                behind += bool(prompts)
        return cls(decodes, due, behind, tuple(prompts), tails)


class Chunk(NamedTuple):
    """What a step may compute.

    Attributes:
        tokens: in all.
        blocks: resident blocks that its prompts may fill.
    """

    tokens: int
    blocks: int


def plenty(queue: TieredFreeBlockQueue, tokens_max: int, running: int, block_size: int) -> bool:
    """Whether free residents hold whatever a step could ask for: there is nothing to decide."""
    return queue.free_residents > cdiv(tokens_max, block_size) + running + PROMPT_RESERVE


def promised(queue: TieredFreeBlockQueue, tails: int, prompts: int) -> int:
    """Resident blocks that a waiting request has to leave alone in this step.

    Of its own blocks all but one are complete after the step, and can be demoted for those who were
    promised a page. So these find theirs wherever one more is to be had now, and nothing is kept;
    else all of it is.

    Args:
        queue: the free blocks; it knows of all complete blocks.
        tails: requests left out of the step at the end of a block.
        prompts: blocks that prompts under way must be able to have, its own among them.
    """
    kept = tails + prompts
    return 0 if queue.free_residents + queue.demotable > kept else kept


def decide_chunk(
    queue: TieredFreeBlockQueue,
    asked: Asked,
    waiting: bool,
    stores: int | None,
    tokens_max: int,
    block_size: int,
) -> Chunk:
    """The tokens of the coming step, so that all of its new blocks find resident pages.

    With ``F`` free residents and ``D`` that can be demoted, the prompts of a step may fill
    ``B = min(F + D - due, max(F - due, 0) + stores)`` blocks, at least one: a running request has
    been promised a page. ``D`` counts whether pooled ids are free or not: where the memory of both
    tiers does not suffice, a request waits or somebody is preempted, just as in vLLM. But where
    CPU memory for pooled blocks is short, what can be had at once counts, since it may grow.
    Prompts under way take theirs first, each up to its end; waiting requests may have what is left,
    unless that is promised to the ``tails``::

        tokens = decodes + sum(tokens of prompts) + block_size * (B left, if more than tails)

    Args:
        queue: the free blocks; it knows of all complete blocks.
        asked: by running requests.
        waiting: whether requests wait.
        stores: blocks that the link can store behind the step's compute; None is without end.
        tokens_max: vLLM's own bound.
        block_size: tokens of a block.
    """
    free = queue.free_residents
    blocks = free + (0 if queue.frozen else queue.demotable) - asked.due
    if queue.withheld:
        blocks = min(blocks, queue.num_free_blocks - asked.due)
    if stores is not None:
        blocks = min(blocks, max(free - asked.due, 0) + stores)
    left = blocks = max(blocks, 1)
    tokens = 0
    for computed, most in asked.prompts:
        begun = -computed % block_size
        taken = min(most, begun + left * block_size)
        tokens += taken
        left -= cdiv(max(taken - begun, 0), block_size)
        if taken < most:
            # It would take the tokens of those behind it, too, and then blocks that are not there.
            tokens = max(tokens - asked.behind, 1)
            break
    else:
        if waiting and left > asked.tails:
            tokens += block_size * left
    return Chunk(max(min(asked.decodes + tokens, tokens_max), 1), blocks)

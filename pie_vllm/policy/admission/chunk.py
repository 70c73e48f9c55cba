"""How many tokens a step may compute, decided before each step.

A block that is being written stays resident, so the new blocks of a step must find resident
pages: free ones, or ones whose blocks can be demoted for them. Between steps a running request
holds one page that is not full, or asks for one at the end of a block, and no more: all other
pages can be had. So ``n`` running requests and a prompt's chunk go together while ``n`` is below
the residents, and nothing has to be kept for chunks to come but one block.

Where a model has several groups of layers, a block of tokens takes a resident of each group that
grows with tokens: ``cost`` of them. Blocks of groups without a pool cannot be demoted; they are
given back when they leave their window.
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
        left: tokens that it has and whose KV is still to be computed, at least 1; of one that
            decodes the draft tokens that the step would verify, too.
        prompt: whether these are more than the one that it sampled last, and its drafts.
        out: whether it is left out of the step.
        lacks: blocks that a step in which it decodes takes for it; None for one at the end of a
            block, where it computes one token.
    """

    computed: int
    left: int
    prompt: bool
    out: bool
    lacks: int | None = None


class Asked(NamedTuple):
    """What running requests ask of a step.

    Attributes:
        decodes: tokens of requests that decode, draft tokens included.
        due: blocks that these need.
        behind: of these tokens those that come after the first prompt, which is served before.
        prompts: tokens computed and tokens left of each request that works on its prompt.
        tails: blocks that requests which are left out of the step need when they are back.
    """

    decodes: int = 0
    due: int = 0
    behind: int = 0
    prompts: tuple[tuple[int, int], ...] = ()
    tails: int = 0

    @classmethod
    def of(
        cls, running: Iterable[tuple[int, int, bool, bool, int | None]], block_size: int
    ) -> Asked:
        """Count over the running requests, each as ``Runs``, in the order they are served in."""
        decodes = due = behind = tails = 0
        prompts: list[tuple[int, int]] = []
        for computed, left, prompt, out, lacks in running:
            needs = computed % block_size == 0 if lacks is None else lacks
            if out:
                tails += needs
            elif prompt:
                prompts.append((computed, left))
            else:
                decodes += left
                due += needs
                behind += left if prompts else 0
        return cls(decodes, due, behind, tuple(prompts), tails)


class Chunk(NamedTuple):
    """What a step may compute.

    Attributes:
        tokens: in all.
        blocks: resident blocks that its prompts may fill.
    """

    tokens: int
    blocks: int


def plenty(
    queue: TieredFreeBlockQueue,
    tokens_max: int,
    running: int,
    block_size: int,
    cost: int = 1,
    kept: int = 0,
) -> bool:
    """Whether free residents hold whatever a step could ask for: there is nothing to decide."""
    blocks = cdiv(tokens_max, block_size) + running + PROMPT_RESERVE
    return queue.free_residents - kept > cost * blocks


def promised(queue: TieredFreeBlockQueue, tails: int, prompts: int) -> int:
    """Resident blocks that a waiting request has to leave alone in this step.

    Of its own blocks all but one are complete after the step, and can be demoted for those who were
    promised a page. So these find theirs wherever one more is to be had now, and nothing is kept;
    else all of it is.

    Args:
        queue: the free blocks; it knows of all complete blocks.
        tails: blocks that requests which are left out of the step need when they are back.
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
    cost: int = 1,
    kept: int = 0,
    lookahead: int = 0,
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

    With several groups of layers ``due`` counts ``cost`` times, and ``B`` is divided by it.

    Args:
        queue: the free blocks; it knows of all complete blocks.
        asked: by running requests.
        waiting: whether requests wait.
        stores: blocks that the link can store behind the step's compute; None is without end.
        tokens_max: vLLM's own bound.
        block_size: tokens of a block.
        cost: residents that a block of tokens takes in all groups of layers.
        kept: residents that a waiting request takes for windows and states that it kept.
        lookahead: tokens behind those of the step for which each request has slots.
    """
    free, due = queue.free_residents, cost * asked.due
    blocks = free + (0 if queue.frozen else queue.demotable) - due - kept
    if queue.withheld:
        blocks = min(blocks, queue.num_free_blocks - due)
    if stores is not None:
        blocks = min(blocks, max(free - due, 0) + stores)
    left = blocks = max(blocks // cost, 1)
    tokens = 0
    for computed, most in asked.prompts:
        begun = -(computed + lookahead) % block_size
        taken = min(most, begun + left * block_size)
        tokens += taken
        left -= cdiv(max(taken - begun, 0), block_size)
        if taken < most:
            # It would take the tokens of those behind it, too, and then blocks that are not there.
            tokens = max(tokens - asked.behind, 1)
            break
    else:
        if waiting and left > asked.tails:
            tokens += max(block_size * left - lookahead, 1)
    return Chunk(max(min(asked.decodes + tokens, tokens_max), 1), blocks)

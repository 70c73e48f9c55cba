"""What a waiting request asks of its admission, and what running ones still need beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pie_vllm.policy.admission.lookup import ParkedHits


class Claims(NamedTuple):
    """Residents that running requests still need in a step, beyond the blocks they have.

    Attributes:
        prompts: Whether one of them has prompt chunks left.
        tails: Number of blocks that requests which are left out of the step ask for later: one
            for each at the end of a block, or as many as a step of drafts takes.
    """

    prompts: bool = False
    tails: int = 0


class Candidate(NamedTuple):
    """A waiting request that asks to be admitted.

    Attributes:
        request_id: Its name.
        num_tokens: Number of tokens that it has.
        computed: Number of tokens whose KV its own blocks hold; 0 unless it goes on with them.
        hits: Blocks found in the prefix cache, in the order of its table.
        parked: Parked KV that follows on these.
        new_tokens: Number of tokens that it would compute in the step.
        span: Number of its tokens for which both tiers together must have room.
        whole: Whether these are all its tokens, rather than those up to the step's end.
        beside: Whether other requests run. If not, it is admitted wherever it fits.
        others: Number of residents that its span takes at once in groups without a pool.
        others_now: Number of new residents, and idle ones that were found, that the step takes in
            these groups.
        lookahead: Number of tokens behind those of the step for which it gets slots, too.
    """

    request_id: str
    num_tokens: int
    computed: int
    hits: Sequence[Any]
    parked: ParkedHits
    new_tokens: int
    span: int
    whole: bool
    beside: bool
    others: int = 0
    others_now: int = 0
    lookahead: int = 0

    def from_start(self) -> Candidate:
        """The same without KV that was computed before."""
        return self._replace(hits=(), parked=ParkedHits.none(0))

    @property
    def reached(self) -> int:
        """Number of its tokens whose KV it has after the step."""
        return self.computed + self.parked.tokens + self.new_tokens

    @property
    def slots(self) -> int:
        """Number of tokens for which it has slots in the step."""
        return self.reached + self.lookahead

    @property
    def partial(self) -> bool:
        """Whether it has tokens left to compute after the step."""
        return self.reached < self.num_tokens

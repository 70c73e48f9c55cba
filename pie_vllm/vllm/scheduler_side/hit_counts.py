"""What admitted requests found in the prefix cache, and what they compute again."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from pie_vllm.policy.admission.lookup import ParkedHits
from pie_vllm.vllm.scheduler_side.metrics import Hits

_ID = attrgetter("block_id")


class HitCounts:
    """Counts since the start.

    Attributes:
        hits: Number of blocks found in the prefix cache, by the place of their KV.
        recomputed_tokens: Number of tokens that preempted requests computed again.
    """

    def __init__(self, boundary: int) -> None:
        """Nobody was admitted; ids from ``boundary`` on are pooled."""
        self._boundary = boundary
        self._computed: dict[str, int] = {}
        self._ahead: dict[str, int] = {}
        self.hits = Hits()
        self.recomputed_tokens = 0

    def count(self, request_id: str, hits: Sequence[Any], parked: ParkedHits) -> None:
        """A request was admitted with these blocks, some of which were parked."""
        pooled = sum(map(self._boundary.__le__, map(_ID, hits)))
        pooled -= parked.parked - parked.residents
        resident = len(hits) - pooled - parked.parked
        ahead = min(self._ahead.pop(request_id, 0), resident)
        before = self.hits
        self.hits = Hits(
            before.resident + resident - ahead,
            before.pooled + pooled,
            before.parked + parked.parked + ahead,
        )
        computed = self._computed.pop(request_id, 0)
        self.recomputed_tokens += max(0, computed - parked.tokens)

    def ahead(self, request_id: str, blocks: int) -> None:
        """So many parked blocks of a request come back before it is admitted."""
        self._ahead[request_id] = self._ahead.get(request_id, 0) + blocks

    def preempted(self, request_id: str, computed: int) -> None:
        """A request loses so many computed tokens."""
        self._computed[request_id] = computed

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._computed.pop(request_id, None)
        self._ahead.pop(request_id, None)

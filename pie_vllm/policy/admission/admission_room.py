"""Which free blocks a waiting request may use in a step, and whether they suffice for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.candidate import Candidate, Claims
from pie_vllm.policy.admission.chunk import PROMPT_RESERVE, promised
from pie_vllm.policy.admission.lookup import Room
from pie_vllm.policy.admission.restore import ParkedKey
from pie_vllm.policy.admission.waits import short_at_once, short_of
from pie_vllm.policy.placement.residency import Residency


class AdmissionRoom:
    """Counts the blocks that waiting requests may use, on the terms of a step; changes nothing.

    Attributes:
        chunk_blocks: Number of blocks that prompts may fill in the step.
        prompt_reserve: Number of residents that waiting requests leave to prompts under way.
        watermark: Share of the blocks in both tiers that an admission leaves free.
        claims: Asks what running requests still need; called once a step, when the first waiting
            request is looked at.
        kept_back: Number of pooled ids beyond the limit, which no admission may count on.
    """

    def __init__(
        self,
        residency: Residency,
        idle_of: Callable[[Sequence[Any]], int],
        block_size: int,
        watermark: float,
    ) -> None:
        """Start before the first step; everything may be pooled.

        Args:
            residency: Where blocks live.
            idle_of: Gives the number of a request's hits that nobody uses.
            block_size: Tokens of a block.
            watermark: Share of the blocks in both tiers that an admission leaves free.
        """
        self._residency, self._idle_of, self._block_size = residency, idle_of, block_size
        self._claims: Claims | None = None
        self.chunk_blocks = residency.boundary
        self.prompt_reserve = PROMPT_RESERVE
        self.watermark = watermark
        self.claims: Callable[[], Claims] = Claims
        self.kept_back = 0

    def begin_step(self, pooled_admission_max: int) -> None:
        """Set the terms of a step.

        Args:
            pooled_admission_max: Number of pooled ids that admissions may count on.
        """
        self._claims = None
        self.kept_back = self._residency.window - pooled_admission_max

    def admitted(self, request: Candidate) -> None:
        """A request was admitted: those behind it leave a block to its prompt, too."""
        if request.partial:
            self._claims = self._claimed()._replace(prompts=True)

    def available(self) -> Room:
        """What a waiting request may use of the blocks that are free."""
        queue, claims = self._residency.queue, self._claimed()
        kept = claims.tails + (self.prompt_reserve if claims.prompts else 0)
        pooled = queue.available_pooled - self.kept_back
        return Room(queue.free_residents - kept, pooled, self.chunk_blocks)

    def reserve(self, request: Candidate) -> int:
        """Number of residents that a request leaves alone, because running ones need them."""
        claims = self._claimed()
        prompts = request.beside and (request.partial or claims.prompts)
        kept = self.prompt_reserve if prompts else 0
        return promised(self._residency.queue, claims.tails, kept)

    def headroom(self) -> int:
        """Blocks of both tiers that the watermark has an admission leave free.

        A share of the blocks that requests may use now, without pooled ids beyond the limit or
        without CPU memory. It leaves to use no less than the same share of the blocks that the
        device's bytes would hold without a ring, which is what it would be without pie.
        """
        if not self.watermark:
            return 0
        geometry, missing = self._residency.geometry, self._residency.queue.missing
        usable = geometry.num_blocks - min(geometry.pooled_blocks, max(missing, self.kept_back))
        device = geometry.device_bytes // geometry.block_bytes
        device_used = device - int(self.watermark * device)
        return max(0, min(int(self.watermark * usable), usable - device_used))

    def short_in_all(self, request: Candidate) -> str | None:
        """Why a request's tokens do not fit both tiers, within the limit while others run.

        Returns:
            One of ``waits.REASONS``; None if they fit.
        """
        queue, hits = self._residency.queue, request.hits
        held = len(self._residency.tables.get(request.request_id, ())) + len(hits)
        needed = max(0, cdiv(request.span, self._block_size) - held)
        needed += self._idle_of(hits) + request.others
        if request.others > queue.num_free_blocks:
            return "residents"
        within, headroom = queue.available_in_all, 0
        if request.beside:
            # Rows that are on their way count: the schedule waits for them.
            there = queue.available_in_all - queue.free_residents
            pooled = min(there, queue.free_pooled - self.kept_back)
            within, headroom = queue.free_residents + pooled, self.headroom()
        return None if needed + headroom <= within else short_of(queue, needed, within)

    def short_in_step(self, request: Candidate, reserve: int) -> str | None:
        """Why the blocks that the step computes are not there once its parked KV has blocks.

        Restoring it first and finding out then costs what the restoring costs. Pooled ids for it
        come with rows of their own.

        Args:
            request: Who is to be admitted.
            reserve: Number of residents to leave alone.

        Returns:
            One of ``waits.REASONS``; None if they can be had.
        """
        queue, parked, hits = self._residency.queue, request.parked, request.hits
        idle = self._idle_of(hits) + parked.parked
        if len(parked.found) > parked.parked:
            others = (b for b in parked.found if not isinstance(b, ParkedKey))
            idle += sum(block.ref_cnt == 0 for block in others)
        attached = parked.parked - parked.residents
        within = queue.on_terms(idle - parked.residents, reserve, attached)
        held = len(self._residency.tables.get(request.request_id, ()))
        used = held + len(hits) + len(parked.found) - idle
        wanted = cdiv(request.slots, self._block_size) - used + request.others_now
        return None if wanted <= within else short_at_once(queue, wanted)

    def short_of_new(self, request: Candidate, hits: Sequence[Any]) -> str:
        """Why a prepared request, which begins with ``hits``, found no new blocks."""
        residency = self._residency
        used = sum(block.ref_cnt > 0 for block in hits)
        used += len(residency.tables.get(request.request_id, ()))
        wanted = cdiv(request.slots, self._block_size) - used + request.others_now
        return short_at_once(residency.queue, wanted)

    def _claimed(self) -> Claims:
        if self._claims is None:
            self._claims = self.claims()
        return self._claims

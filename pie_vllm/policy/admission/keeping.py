"""What is kept of a request that gives its blocks back."""

from __future__ import annotations

from pie_vllm.policy.admission.request_keys import RequestKeys
from pie_vllm.policy.admission.restore import forget_unfilled, keep_tail, keep_whole
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.policy.pool.ended_requests import Whole


class Keeping:
    """Keeps KV of preempted requests, and of ended ones that can be used as a whole only.

    Full blocks with keys of their contents are kept in any case (``Parking``).

    Attributes:
        decision: Bounds of the newest step; None before the first one.
    """

    def __init__(
        self, residency: Residency, request_keys: RequestKeys | None, block_size: int
    ) -> None:
        """Keep nothing before the first step.

        Args:
            residency: Where blocks live.
            request_keys: Keys of blocks by their request; None where they are by their contents.
            block_size: Tokens of a block.
        """
        self._residency, self._parking = residency, residency.parking
        self._request_keys, self._block_size = request_keys, block_size
        self.decision: Decision | None = None
        self._step = self._stored = 0  # The step in which requests ended last, stores for them.

    def begins(self, request_id: str, computed: int) -> None:
        """A request is about to give its blocks back; so many of its tokens have complete KV."""
        if self._parking.enabled:
            forget_unfilled(self._residency, request_id, computed, self._block_size)

    def preempted(self, request_id: str, computed: int) -> None:
        """Keep what a preempted request goes on with; its KV is right for when it comes again."""
        residency, size = self._residency, self._block_size
        table = residency.tables.get(request_id, ())
        if not table:
            return
        if self._request_keys is not None:
            self._request_keys.keep(request_id, table[: computed // size])
        if not residency.beside:
            keep_tail(residency, request_id, table, computed, size)
        elif not (
            self._restores
            and self._parking.enabled
            and keep_whole(residency, request_id, table, computed, size)
        ):
            self.forget(request_id)

    def ended(self, request_id: str, whole: Whole | None) -> None:
        """Keep an ended request as a whole, where that is the only way to use it.

        Only where the device no longer holds all that is cached. The link stores no more for
        requests that end in a step than it does behind the step's compute.

        Args:
            request_id: Its name.
            whole: What can be kept; None where nobody is to find it.
        """
        self.forget(request_id)
        residency, parking = self._residency, self._parking
        table = residency.tables.get(request_id, ())
        keeps = residency.beside and parking.enabled and self._request_keys is None
        if whole is None or not (table and keeps and residency.evictions and self._restores):
            return
        if self._step != residency.planner.step:
            self._step, self._stored = residency.planner.step, 0
        most = None if self.decision is None else self.decision.park_blocks_max
        left = None if most is None else max(most - self._stored, 0)
        before = parking.parked_blocks
        if keep_whole(
            residency, request_id, table, whole.computed, self._block_size, left, spare_only=True
        ):
            parking.ended.keep(request_id, whole.tokens)
        self._stored += parking.parked_blocks - before

    def forget(self, request_id: str) -> None:
        """A request has no use for KV that was kept of it by its name: other tokens, other weights.

        Its full blocks stay where they have keys of their contents, which change with these.
        """
        self._parking.tails.drop(request_id)
        if self._request_keys is not None:
            self._request_keys.forget(request_id)

    @property
    def _restores(self) -> bool:
        """Whether what is kept is copied back at all; until the first step, it is."""
        return self.decision is None or self.decision.restore_enabled

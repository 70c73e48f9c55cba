"""The admission of waiting requests: prepared, then committed or rolled back.

A step has one ``Admission``, which holds the step's terms and is asked for one waiting request
after the other, in their order. A request that may start gets a ``Transaction``: its parked KV has
blocks then, and the free queue counts on its terms. The caller allocates the rest, as vLLM does or
as the simulator does, and says whether that succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from operator import attrgetter
from types import TracebackType
from typing import Any

from pie_vllm.errors import IntegrityError
from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.admission_room import AdmissionRoom
from pie_vllm.policy.admission.candidate import Candidate
from pie_vllm.policy.admission.keeping import Keeping
from pie_vllm.policy.admission.lookup import NO_LIMITS, Limits, ParkedHits, ParkedLookup
from pie_vllm.policy.admission.request_keys import RequestKey, RequestKeys
from pie_vllm.policy.admission.restore import (
    cancel,
    push_out,
    restore,
    restore_part,
    restored_at_once,
)
from pie_vllm.policy.admission.waits import Patience
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.interfaces import Cached
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.policy.pool.ended_requests import Whole
from pie_vllm.policy.pool.tails import Tail

_USERS = attrgetter("ref_cnt")

LOOK_KEYS_MAX = 256
"""Maximum number of keys looked up in a step for waiting requests while others run, if the step
may not handle more blocks. A look at one that is not in the processor's cache takes about 2 us."""


class Admission:
    """Decides which waiting requests start in a step, and with what of their KV.

    Attributes:
        decision: Bounds of the step.
        room: Blocks that waiting requests may use in the step.
        keeping: Decides what is kept of requests that give their blocks back.
        on_restored_ahead: Called with a request and the number of its blocks that are copied back
            before it is admitted.
        refused: Reason for which the newest request was refused, one of ``waits.REASONS``; None
            if none was.
    """

    def __init__(
        self,
        residency: Residency,
        cached: Cached,
        block_size: int,
        watermark: float = 0.0,
        *,
        by_request: bool = False,
        ahead: int = 0,
    ) -> None:
        """Start before the first step; everything may be pooled.

        Args:
            residency: Where blocks live.
            cached: Looks keys up in the prefix cache.
            block_size: Tokens of a block.
            watermark: Share of the blocks in both tiers that an admission leaves free.
            by_request: Whether blocks have no keys of their contents, so that a preempted request
                finds its own by its name.
            ahead: Maximum number of slots that a step gives a request behind all of its tokens:
                for drafts to verify, and for those that a drafter writes.
        """
        self._residency = residency
        self._block_size = block_size
        self._lookup = ParkedLookup(residency, cached, block_size, ahead)
        self._request_keys = RequestKeys(residency, cached) if by_request else None
        self.keeping = Keeping(residency, self._request_keys, block_size)
        self._patience = Patience()
        self._restored = 0
        self._others_run = False
        self.decision = Decision(
            load_blocks_max=0, pooled_admission_max=residency.window, spare_load_blocks_max=0
        )
        self.room = AdmissionRoom(residency, self._lookup.idle_of, block_size, watermark)
        self.on_restored_ahead: Callable[[str, int], None] = lambda *_: None
        self.refused: str | None = None

    def begin_step(self, decision: Decision, running_blocks: int) -> None:
        """Set the terms of a step, before anything is scheduled.

        The limit applies as vLLM's watermark does, to waiting and preempted requests only and
        only while something runs, so it can neither preempt nor deadlock. What is pooled beyond it
        has the first call on free residents.

        Args:
            decision: Bounds of the step.
            running_blocks: Number of blocks that running requests may take in it.
        """
        self.refused = None
        self._others_run = running_blocks > 0
        self._restored = self._lookup.looked = 0
        self.decision = decision
        self.keeping.decision = decision
        self.room.begin_step(decision.pooled_admission_max)
        if self._residency.queue.num_free_blocks < running_blocks:
            self._residency.catch_up()

    def recall(self, request_id: str, state: object) -> list[Any] | None:
        """Blocks in the prefix cache that a refused request was found to begin with.

        Args:
            request_id: Its name.
            state: Value that is another one if its tokens or their keys are others.

        Returns:
            Those that are still right, to be given to ``find_parked``, which may extend them; None
            if they are to be looked up.
        """
        return self._lookup.recall(request_id, state)

    def request_keys(self, request_id: str, first: int, end: int) -> Iterator[RequestKey]:
        """Keys of a request's blocks from ``first`` up to ``end`` that outlived a preemption.

        Raises:
            IntegrityError: Blocks have keys of their contents.
        """
        if self._request_keys is None:
            raise IntegrityError(f"the blocks of {request_id} are not kept by its name")
        return self._request_keys.of(request_id, first, end)

    def find_parked(
        self,
        request_id: str,
        num_tokens: int,
        keys: Iterable[Hashable],
        hits: Sequence[Any],
        *,
        with_tail: bool = True,
        state: object = None,
    ) -> ParkedHits | None:
        """Parked KV behind a waiting request's ``hits``; None if there is none, or it stays parked.

        Changes nothing but the order in which blocks are reused or given up.

        Args:
            request_id: Of a request that may find KV that was computed before.
            num_tokens: Number of tokens that it has, the last of which is computed anyway.
            keys: Keys of its full blocks after ``hits``, read on demand.
            hits: Blocks found in the prefix cache, or what ``recall`` gave.
            with_tail: Whether the hit may end within a block, with the request's tail.
            state: As ``recall``.
        """
        if not (self._residency.parking.any and self.decision.restore_enabled):
            self._lookup.begin(request_id, state, keys, hits)
            return None
        limits = NO_LIMITS
        if self._others_run:
            at_once, handled = self._restored_at_once(), self.decision.handled_blocks_max
            waits = self._patience.waits(request_id, cdiv(num_tokens, self._block_size))
            left = max(LOOK_KEYS_MAX, handled or 0) - self._lookup.looked
            bounds = (at_once, None) if waits or self._restored else (None, handled)
            limits = Limits(max(left, 1), *bounds)
            if not (waits or self._restored) and self._residency.beside:
                limits = NO_LIMITS  # A part would be of no use.
        room = self.room.available()
        return self._lookup.find(
            request_id, num_tokens, keys, hits, room, with_tail, state=state, limits=limits
        )

    def prepare(self, request: Candidate) -> Transaction | None:
        """Get a waiting request ready for its allocation; None if it waits in this step.

        What was found of its KV is remembered then (``recall``).

        The whole sequence must fit both tiers together, idle prefix hits are not counted as
        residents, and residents that running requests still need are left alone: for the chunks
        of prompts under way, and for those left out of this step at the end of a block. Parked
        KV that the link cannot copy back behind the step's compute is copied back in parts, while
        the request waits.
        """
        transaction = self._prepare(request)
        if transaction is None:
            self._lookup.keep(request.request_id)
        return transaction

    def _prepare(self, request: Candidate) -> Transaction | None:
        residency, parked = self._residency, request.parked
        if parked.cut and request.beside:
            if parked.incomplete:
                self.refused = "restore"
                return None
            if self._may_wait(request):
                return None  # There will be room once others are done.
        bounded = request.whole or self.room.kept_back or self.room.watermark
        if bounded and (reason := self.room.short_in_all(request)):
            self.refused = reason
            return None
        residency.catch_up()
        most = self._restored_at_once()
        in_parts = request.beside and (parked.more or parked.residents > most)
        if in_parts and self._may_wait(request):
            self._restore_part(request, min(most, parked.residents))
            return None
        if parked.incomplete:
            request = request.from_start()
            parked = request.parked
        if parked.parked and not self._lookup.still_parked(len(parked.found)):
            self.refused = "restore"
            return None
        reserve = self.room.reserve(request)
        if parked.parked > parked.residents:
            self._lookup.protect_pooled()
        found = request.hits or parked.parked or (parked.tail and residency.beside)
        if found and (reason := self.room.short_in_step(request, reserve)):
            self.refused = reason
            if parked.tail and residency.beside and not request.beside:
                self._make_room(request)
            return None
        return Transaction(self, residency, request, reserve)

    def _make_room(self, request: Candidate) -> None:
        """Have a request that comes back alone fit with its windows and its state, a step later.

        Its chunk gets smaller while it is refused; if that is no help, it is computed anew.
        """
        if push_out(self._residency, request.hits):
            self.refused = "restore"
        elif request.new_tokens <= self._block_size:
            self.keeping.forget(request.request_id)

    def _restored_at_once(self) -> int:
        """Parked blocks that may still come back in the step while others run, for all requests."""
        decision = self.decision
        most = restored_at_once(self._residency, decision.restore_blocks_max)
        handled = decision.handled_blocks_max
        if handled is not None:
            most = min(most, handled)
        elif decision.restore_blocks_max is None:
            return most
        return max(most - self._restored, 0)

    def _restore_part(self, request: Candidate, most: int) -> None:
        """Copy the next parked blocks of a request back while it waits."""
        lookup, parked = self._lookup, request.parked
        lookup.keep(request.request_id)
        if most and lookup.still_parked(most):
            self._restored += most
            blocks = restore_part(self._residency, parked.found, len(request.hits), most)
            lookup.restored(blocks)
            self.on_restored_ahead(request.request_id, most)

    def releases(
        self,
        request_id: str,
        computed: int,
        *,
        finished: bool,
        reusable: bool = True,
        whole: Whole | None = None,
    ) -> None:
        """A request is about to give its blocks back: forget it, but for KV that is worth keeping.

        Args:
            request_id: Its name.
            computed: Number of its tokens whose KV is complete.
            finished: Whether it has ended, rather than been preempted.
            reusable: Whether its KV is right for when it comes again.
            whole: What of one that has ended can be kept; None where nobody is to find it.
        """
        keeping = self.keeping
        keeping.begins(request_id, computed)
        if not reusable:
            keeping.forget(request_id)
        elif finished:
            keeping.ended(request_id, whole)
        else:
            keeping.preempted(request_id, computed)
        if finished:
            self._patience.forget(request_id)
            self._lookup.forget(request_id)
        self._residency.forget(request_id)

    def _may_wait(self, request: Candidate) -> bool:
        """Whether a request waits for its parked KV in this step.

        It always does behind one whose KV came back in the step: the next step begins with it.
        """
        blocks = cdiv(request.num_tokens, self._block_size)
        if not (self._restored or self._patience.wait(request.request_id, blocks)):
            return False
        self.refused = "restore"
        return True

    def _failed(self, request: Candidate, hits: Sequence[Any]) -> None:
        """Note why a prepared request found no blocks."""
        self.refused = self.room.short_of_new(request, hits)

    def _admitted(self, request: Candidate) -> None:
        """Note for those behind it that a request was admitted."""
        self._patience.forget(request.request_id)
        self._lookup.forget(request.request_id)
        self._others_run = True
        self._restored += request.parked.parked
        self.room.admitted(request)


class Transaction:
    """One request's admission, prepared.

    Use it as a context around the allocation of the request's blocks, in which the free queue
    counts on its terms; then call ``commit`` or ``roll_back``.

    Attributes:
        hits: Blocks that the request begins with, those restored from parked KV among them.
        goes_on: Whether it was admitted before and kept its blocks.
    """

    def __init__(
        self, admission: Admission, residency: Residency, request: Candidate, reserve: int
    ) -> None:
        """Give the parked KV of the request blocks.

        Args:
            admission: Its terms.
            residency: Where blocks live.
            request: Who is to be admitted.
            reserve: Number of residents to leave alone.
        """
        self._admission, self._residency, self._request = admission, residency, request
        self._reserve = reserve
        parked, name = request.parked, request.request_id
        self.goes_on = name in residency.victims.holders
        self.hits = list(request.hits)
        if parked.parked:
            self.hits += restore(residency, parked.found, len(self.hits), parked.residents)
        self._tail = None
        if parked.tail:
            self._tail = residency.parking.tails.take(name)
            residency.supply.withhold()
        residency.admit(name, len(self.hits))

    @property
    def has_tail(self) -> bool:
        """Whether its tail comes back, in the first block that it is allocated."""
        return self._tail is not None

    def __enter__(self) -> Transaction:
        """Have the queue count on the request's terms."""
        # Restored residents are free blocks that the request takes: they are counted rightly.
        idle = [*map(_USERS, self.hits)].count(0) - self._request.parked.residents
        self._residency.queue.admission(idle, self._reserve)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Have the queue count as for everybody."""
        self._residency.queue.admission()

    def commit(self) -> None:
        """The request got its blocks."""
        residency, name = self._residency, self._request.request_id
        if not self.goes_on:
            residency.admitted(name)
        if self._tail is not None:
            self._restore_tail(self._tail)
        elif residency.parking.tails:
            residency.parking.tails.drop(name)
        self._admission._admitted(self._request)

    def _restore_tail(self, tail: Tail) -> None:
        residency, name = self._residency, self._request.request_id
        tables = {group.number: group.tables[name] for group in residency.beside}
        for one in tail.blocks:
            table = residency.tables[name] if one.group is None else tables[one.group]
            block = table[one.index]
            if block.is_null:
                raise IntegrityError(f"{name} has no block {one.index} in group {one.group}")
            residency.parking.tails.restore(one, block.block_id)

    def roll_back(self) -> None:
        """The request got no blocks: leave everything as it was before ``prepare``."""
        residency, name = self._residency, self._request.request_id
        self._admission._failed(self._request, self.hits)
        self._admission._lookup.keep(name)
        if not self.goes_on:
            residency.forget(name)
        cancel(residency, self.hits)
        if self._tail is not None:
            residency.parking.tails.put_back(name, self._tail)
        residency.supply.withhold()

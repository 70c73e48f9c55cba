"""A plain scheduler of vLLM's kind over two tiers of blocks, for simulations.

First come first served, chunked prompts, one token a step for each request past its prompt,
preemption of the last. Its blocks are found again where requests have keys, as with vLLM's prefix
cache. Whom it admits is what ``PieBlockSpaceManager`` admits, but that no residents are kept for
the next block of requests that are left out of the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.chunk import (
    PROMPT_RESERVE,
    Asked,
    Runs,
    decide_chunk,
    plenty,
    promised,
)
from pie_vllm.policy.admission.leaving import keep_tail
from pie_vllm.policy.admission.lookup import ParkedHits, ParkedLookup, Room
from pie_vllm.policy.admission.restore import cancel, restore, restore_part, restored_at_once
from pie_vllm.policy.admission.waits import Patience
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.simulation.prefix_cache import PrefixBook, give_back


@dataclass(eq=False)
class Request:
    """One request.

    Attributes:
        request_id: its name.
        prompt: tokens, those of a chat's turns before included.
        left: tokens of the answer that are still to come.
        keys: of its blocks in the prefix cache; none are cached without.
        arrived: seconds on the clock.
        known: tokens that it has: the prompt and what was answered.
        computed: of these, those whose KV it has.
        reached: most that were ever computed.
        cached: blocks at the front of its table that the prefix cache was told of.
        table: its blocks.
    """

    request_id: str
    prompt: int
    left: int
    keys: Sequence[Hashable] = ()
    arrived: float = 0.0
    known: int = field(init=False)
    computed: int = 0
    reached: int = 0
    cached: int = 0
    table: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = self.prompt


class Scheduled(NamedTuple):
    """What runs in a step.

    Attributes:
        ran: requests and the tokens that they compute, by id.
        fresh: those of them that were admitted in it.
    """

    ran: dict[str, tuple[Request, int]]
    fresh: set[str]


class SimulatedScheduler:
    """Gives requests blocks and tokens.

    Attributes:
        waiting, running: requests, the first to be served first.
        chunk_blocks: blocks that prompts may fill in the newest step.
        preemptions: so far.
        restored: parked blocks and tails that came back to requests so far.
    """

    def __init__(
        self,
        residency: Residency,
        tables: dict[str, list[Any]],
        book: PrefixBook,
        block_size: int,
        max_running: int,
        max_tokens: int,
    ) -> None:
        """Before the first request.

        Args:
            residency: whose blocks.
            tables: blocks of each request; the residency's own.
            book: the prefix cache; its entries are the residency's.
            block_size: tokens of a block.
            max_running: requests at once.
            max_tokens: tokens that one step may compute.
        """
        self._residency, self._tables, self._book = residency, tables, book
        self._size, self._max_running, self._max_tokens = block_size, max_running, max_tokens
        self._lookup = ParkedLookup(residency, book.get, block_size)
        self._patience = Patience()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.chunk_blocks = cdiv(max_tokens, block_size)
        self.preemptions = self.restored = 0

    def schedule(self, decision: Decision, left_out: Collection[str]) -> Scheduled:
        """Schedule a step, in which these requests do not run; counts no token as computed."""
        budget = self._tokens(decision, left_out)
        ran: dict[str, tuple[Request, int]] = {}
        fresh: set[str] = set()
        preempted = False
        for request in list(self.running):
            if request.request_id in left_out or request not in self.running or budget <= 0:
                continue
            tokens = min(request.known - request.computed, budget)
            while not self._allocate(request, tokens):
                last = self.running.pop()
                preempted = True
                budget += ran.pop(last.request_id, (last, 0))[1]
                self._preempt(last)
                if last is request:
                    break
            else:
                ran[request.request_id] = (request, tokens)
                budget -= tokens
        while self.waiting and budget > 0 and not preempted:
            request = self.waiting[0]
            if len(self.running) >= self._max_running:
                break
            tokens = self._admit(request, budget, decision, bool(ran))
            if not tokens:
                break
            self.running.append(self.waiting.popleft())
            ran[request.request_id] = (request, tokens)
            fresh.add(request.request_id)
            budget -= tokens
        return Scheduled(ran, fresh)

    def _tokens(self, decision: Decision, left_out: Collection[str]) -> int:
        """How many tokens the step may compute."""
        queue, size, most = self._residency.queue, self._size, self._max_tokens
        self.chunk_blocks = cdiv(most, size)
        if plenty(queue, most, len(self.running), size):
            return most
        asked = Asked.of(
            (
                Runs(r.computed, r.known - r.computed, self._works(r), r.request_id in left_out)
                for r in self.running
            ),
            size,
        )
        chunk = decide_chunk(
            queue, asked, bool(self.waiting), decision.prompt_demotion_max, most, size
        )
        self.chunk_blocks = chunk.blocks
        return chunk.tokens

    def finish(self, request: Request) -> None:
        """A running request has its answer."""
        self.running.remove(request)
        self._free(request)

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        name, table = request.request_id, request.table
        keep_tail(self._residency, name, table, request.computed, self._size)
        self._free(request)
        request.computed = 0
        self.waiting.appendleft(request)

    def _prompts(self) -> bool:
        """Whether a running request has prompt tokens left."""
        return any(self._works(r) for r in self.running)

    @staticmethod
    def _works(request: Request) -> bool:
        """Whether a request has prompt tokens left."""
        return request.known > request.computed + 1

    def _find(self, request: Request, decision: Decision) -> tuple[list[Any], ParkedHits]:
        """What a waiting request need not compute: cached blocks, and parked ones behind them."""
        residency, size = self._residency, self._size
        keys = request.keys[: (request.known - 1) // size]
        hits = self._book.hits(keys)
        found = None
        if residency.parking.any and decision.restore_enabled:
            queue = residency.queue
            kept = PROMPT_RESERVE if self._prompts() else 0
            pooled = queue.available_pooled - (residency.window - decision.pooled_admission_max)
            room = Room(queue.free_residents - kept, pooled, self.chunk_blocks)
            after = keys[len(hits) :]
            found = self._lookup.find(request.request_id, request.known, after, hits, room)
        return hits, found or ParkedHits.none(len(hits) * size)

    def _admit(self, request: Request, budget: int, decision: Decision, others: bool) -> int:
        """Admit a waiting request; returns the tokens that it computes, 0 if there is no room."""
        residency, parking = self._residency, self._residency.parking
        queue, size, name = residency.queue, self._size, request.request_id
        hits, parked = self._find(request, decision)
        blocks = cdiv(request.known, size)
        if parked.cut and others and self._patience.wait(name, blocks):
            return 0  # There will be room once others are done.
        kept_back = residency.window - decision.pooled_admission_max if others else 0
        needed = blocks - sum(block.ref_cnt > 0 for block in hits)
        if needed + kept_back > queue.available_in_all:
            return 0
        most = restored_at_once(residency, decision.restore_blocks_max)
        if others and parked.residents > most and self._patience.wait(name, blocks):
            restore_part(residency, parked.found, len(hits), most)
            self.restored += most
            return 0
        tokens = min(request.known - parked.tokens, budget)
        partial = parked.tokens + tokens < request.known or self._prompts()
        if parked.parked:
            hits += restore(residency, parked.found, len(hits), parked.residents)
        tail = None
        if parked.tail_tokens:
            tail = parking.tails.take(name)
            residency.withhold()
        residency.admit(name, len(hits))
        self._tables[name] = request.table
        idle = sum(block.ref_cnt == 0 for block in hits)
        prompts = PROMPT_RESERVE if others and partial else 0
        queue.admission(idle - parked.residents, promised(queue, 0, prompts))
        try:
            new = cdiv(parked.tokens + tokens, size) - len(hits)
            admitted = new + idle <= queue.num_free_blocks
            if admitted:
                self._touch(request, hits)
                self._take(request, new)
        finally:
            queue.admission()
        if not admitted:
            residency.forget(name)
            cancel(residency, hits)
            if tail is not None:
                parking.tails.put_back(name, tail)
            residency.withhold()
            return 0
        residency.admitted(name)
        self._patience.forget(name)
        request.cached, request.computed = len(hits), parked.tokens
        self._cache(request, parked.tokens + tokens)
        if tail is None:
            parking.tails.drop(name)
        else:
            parking.tails.restore(tail, request.table[len(hits)].block_id)
        self.restored += parked.parked + (tail is not None)
        return tokens

    def _allocate(self, request: Request, tokens: int) -> bool:
        """Give a running request the blocks for so many more tokens, if they can be had."""
        end = request.computed + tokens
        count = cdiv(end, self._size) - len(request.table)
        if count > self._residency.queue.num_free_blocks:
            return False
        self._take(request, count)
        self._cache(request, end)
        return True

    def _touch(self, request: Request, hits: Sequence[Any]) -> None:
        for block in hits:
            if block.ref_cnt == 0:
                self._residency.queue.remove(block)
            block.ref_cnt += 1
            request.table.append(block)

    def _take(self, request: Request, count: int) -> None:
        if count > 0:
            for block in self._residency.queue.popleft_n(count):
                self._book.drop(block)
                block.ref_cnt = 1
                request.table.append(block)

    def _cache(self, request: Request, end: int) -> None:
        """The blocks that so many tokens fill may be found from now on, as in vLLM."""
        for index in range(request.cached, min(end // self._size, len(request.keys))):
            self._book.put(request.table[index], request.keys[index])
            request.cached = index + 1

    def _free(self, request: Request) -> None:
        self._residency.forget(request.request_id)
        give_back(self._residency.queue, self._tables.pop(request.request_id))
        request.table = []

"""A plain scheduler of vLLM's kind over two tiers of blocks, for simulations.

First come first served, chunked prompts, one token a step for each request past its prompt,
preemption of the last. Its blocks are found again where requests have keys, as with vLLM's prefix
cache. Whom it admits and what it leaves out, the policy decides, as for vLLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.candidate import Candidate, Claims
from pie_vllm.policy.admission.chunk import Asked, Runs
from pie_vllm.policy.admission.lookup import ParkedHits
from pie_vllm.policy.admission.transaction import Admission
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.simulation.prefix_cache import PrefixBook, give_back


@dataclass(eq=False)
class Request:
    """One request; what the policy reads of it is named as in vLLM.

    Attributes:
        request_id: Its name.
        prompt: Number of tokens of its prompt, those of a chat's turns before included.
        left: Number of tokens of the answer that are still to come.
        keys: Keys of its blocks in the prefix cache; none are cached without.
        arrived: Seconds on the clock.
        num_tokens: Number of tokens that it has: the prompt and what was answered.
        num_computed_tokens: Number of these whose KV it has.
        is_prefill_chunk: Whether its newest step left some of them to compute.
        reached: Largest number of tokens that were ever computed.
        cached: Number of blocks at the front of its table that the prefix cache was told of.
        table: Its blocks.
    """

    request_id: str
    prompt: int
    left: int
    keys: Sequence[Hashable] = ()
    arrived: float = 0.0
    num_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    is_prefill_chunk: bool = False
    reached: int = 0
    cached: int = 0
    table: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_tokens = self.prompt


class Scheduled(NamedTuple):
    """What runs in a step.

    Attributes:
        tokens: Number of tokens that each request computes, by id.
        fresh: Ids of those that were admitted in the step.
    """

    tokens: dict[str, int]
    fresh: set[str]


class SimulatedScheduler:
    """Gives requests blocks and tokens; the policy's controller looks at it as ``SchedulerView``.

    Attributes:
        waiting, running: Requests, the first to be served first.
        requests: All of them by id.
        admission: Decides about those that wait.
        running_max: Maximum number of running requests.
        tokens_max: Maximum number of tokens that a step computes.
        left_out: Ids of the running requests that compute nothing in the newest step.
        preemptions: Number of preemptions so far.
        restored: Number of parked blocks and tails that came back to requests so far.
    """

    def __init__(
        self,
        residency: Residency,
        tables: dict[str, list[Any]],
        book: PrefixBook,
        block_size: int,
        running_max: int,
        tokens_max: int,
        *,
        by_request: bool = False,
    ) -> None:
        """Before the first request.

        Args:
            residency: whose blocks.
            tables: blocks of each request; the residency's own.
            book: the prefix cache; its entries are the residency's.
            block_size: tokens of a block.
            running_max: requests at once.
            tokens_max: tokens that one step may compute.
            by_request: whether preempted requests find their KV by name, as requests have no keys.
        """
        self._residency, self._tables, self._book = residency, tables, book
        self._size = block_size
        self.running_max, self.tokens_max = running_max, tokens_max
        self._by_request = by_request
        self.admission = Admission(residency, book.find, block_size, by_request=by_request)
        self.admission.on_restored_ahead = self._restored_ahead
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.left_out: frozenset[str] = frozenset()
        self.preemptions = self.restored = 0

    # What the controller asks.

    @property
    def newcomers(self) -> bool:
        """Whether requests wait: none of them holds blocks."""
        return bool(self.waiting)

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait."""
        return len(self.waiting)

    @property
    def num_unfinished(self) -> int:
        """Number of requests that have not ended."""
        return len(self.requests)

    def leave_out(self, request_ids: Sequence[str]) -> None:
        """Have these running requests compute nothing in the coming step."""
        self.left_out = frozenset(request_ids)

    def asked(self) -> Asked:
        """What running requests ask of the coming step."""
        running = (
            Runs(
                r.num_computed_tokens,
                r.num_tokens - r.num_computed_tokens,
                r.is_prefill_chunk,
                r.request_id in self.left_out,
            )
            for r in self.running
        )
        return Asked.of(running, self._size)

    def claims(self) -> Claims:
        """What running requests still need while waiting requests are looked at."""
        tails = sum(
            r.request_id in self.left_out and r.num_computed_tokens % self._size == 0
            for r in self.running
        )
        return Claims(any(r.is_prefill_chunk for r in self.running), tails)

    # Requests.

    def add(self, request: Request) -> None:
        """Take a request, which waits."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self, tokens_max: int) -> Scheduled:
        """Schedule a step of so many tokens at most; counts none of them as computed."""
        budget, index, preempted = tokens_max, 0, False
        tokens: dict[str, int] = {}
        fresh: set[str] = set()
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            index += 1
            if request.request_id in self.left_out:
                continue
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            while not self._allocate(request, count):
                last = self.running.pop()
                preempted = True
                budget += tokens.pop(last.request_id, 0)
                self._preempt(last)
                if last is request:
                    break
            else:
                tokens[request.request_id] = count
                budget -= count
        while self.waiting and budget > 0 and not preempted:
            if len(self.running) >= self.running_max:
                break
            request = self.waiting[0]
            count = self._admit(request, budget)
            if not count:
                break
            self.running.append(self.waiting.popleft())
            tokens[request.request_id] = count
            fresh.add(request.request_id)
            budget -= count
        return Scheduled(tokens, fresh)

    def finish(self, request: Request) -> None:
        """A running request has its answer."""
        self.running.remove(request)
        del self.requests[request.request_id]
        self._free(request, finished=True)

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self._free(request, finished=False)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)

    def _free(self, request: Request, *, finished: bool) -> None:
        name = request.request_id
        self.admission.releases(name, request.num_computed_tokens, finished=finished)
        give_back(self._residency.queue, self._tables.pop(name))
        request.table = []

    def _restored_ahead(self, _: str, blocks: int) -> None:
        self.restored += blocks

    # Blocks.

    def _admit(self, request: Request, budget: int) -> int:
        """Admit a waiting request; returns the tokens that it computes, 0 if there is no room."""
        name, size, tokens = request.request_id, self._size, request.num_tokens
        end = (tokens - 1) // size
        hits = self.admission.recall(name, tokens)
        if hits is None:
            hits = self._book.hits(self._keys(request, 0, end))
        keys = self._keys(request, len(hits), end)
        parked = self.admission.find_parked(name, tokens, keys, hits, state=tokens)
        if parked is None:
            parked = ParkedHits.none(len(hits) * size)
        count = min(tokens - parked.tokens, budget)
        beside = bool(self.running)
        candidate = Candidate(name, tokens, 0, hits, parked, count, tokens, True, beside)
        transaction = self.admission.prepare(candidate)
        if transaction is None:
            return 0
        self._tables[name] = request.table
        with transaction:
            admitted = self._adopt(request, transaction.hits, cdiv(candidate.reached, size))
        if not admitted:
            del self._tables[name]
            transaction.roll_back()
            return 0
        transaction.commit()
        request.cached, request.num_computed_tokens = len(transaction.hits), parked.tokens
        self._cache(request, candidate.reached)
        self.restored += parked.parked + transaction.has_tail
        return count

    def _keys(self, request: Request, first: int, end: int) -> Iterator[Hashable]:
        """Keys of a waiting request's blocks that it may find."""
        if self._by_request:
            return self.admission.request_keys(request.request_id, first, end)
        return islice(request.keys, first, end)

    def _adopt(self, request: Request, hits: Sequence[Any], blocks: int) -> bool:
        """Give a request these blocks and others up to a number, if they can be had."""
        queue = self._residency.queue
        idle = [block for block in hits if block.ref_cnt == 0]
        if blocks - len(hits) + len(idle) > queue.num_free_blocks:
            return False
        queue.remove_n(idle)
        for block in hits:
            block.ref_cnt += 1
        request.table.extend(hits)
        self._take(request, blocks - len(hits))
        return True

    def _allocate(self, request: Request, tokens: int) -> bool:
        """Give a running request the blocks for so many more tokens, if they can be had."""
        end = request.num_computed_tokens + tokens
        count = cdiv(end, self._size) - len(request.table)
        if count > self._residency.queue.num_free_blocks:
            return False
        self._take(request, count)
        self._cache(request, end)
        return True

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

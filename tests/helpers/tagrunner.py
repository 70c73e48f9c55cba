"""A model runner whose KV is tags, so that every page it reads can be checked.

It keeps block tables the way vLLM's V1 runner does (new requests bring whole
tables, running ones bring appended blocks, the plan brings relabels), writes
the tag of every token into the KV page that the table names, and reads all
pages of a request's context in every step. The tag of a token is a hash of all
tokens up to it, so a page with the KV of another request, of another position
or of an older time is noticed, while shared prefixes compare equal. In the pages
tags are mixed with the weights' version and the request's salt, so KV of older
weights or of another salt is noticed, too, though the tokens are the same.

A model may have groups of layers without a pool beside the pooled one: windows, of
whose last tokens it reads the tags, and states, which are the tag of the last token
and are read before they are written. Their pages are read and written as early in a step,
and as late, as anything but the flags of ``StepPlan`` allows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import numpy as np
from vllm.v1.outputs import ModelRunnerOutput

from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS, PoolOrder, PoolState, StepPlan, StepReport, Totals
from tests.helpers.drafts import Drafting, accepted
from tests.helpers.states import Group

MASK = (1 << 31) - 1
VOCABULARY = 997


def next_tag(tag: int, token: int) -> int:
    """The tag of a token after a prefix with ``tag``."""
    return ((tag * 1_000_003) ^ (token + 12_345)) & MASK


def next_token(tag: int) -> int:
    """The token that the made-up model samples after a prefix with ``tag``."""
    return (tag * 31 + 7) % VOCABULARY


def continuation(prompt: list[int], count: int) -> list[int]:
    """What the made-up model answers to a prompt."""
    tag = 0
    for token in prompt:
        tag = next_tag(tag, token)
    answer = []
    for _ in range(count):
        token = next_token(tag)
        answer.append(token)
        tag = next_tag(tag, token)
    return answer


class Work(NamedTuple):
    """What a step's forward pass writes and must find.

    The last four are what groups without a pool do, of whose pages nobody but the plan takes care.
    """

    writes: list[tuple[int, int, int]]
    """(block, slot, tag)."""
    reads: list[tuple[str, int, np.ndarray]]
    """(request, block, tags of the slots from 0)."""
    zeroed: list[int]
    """Blocks that are zeroed at the beginning."""
    free_before: list[tuple[str, int, int, int]]
    """(request, block, slot, tag) before anything is written."""
    free_writes: list[tuple[int, int, int]]
    """(block, slot, tag)."""
    free_reads: list[tuple[str, int, int, int]]
    """(request, block, slot, tag) once all is written."""


class Memory(Protocol):
    """Where the tags live; carries out plans."""

    def run(self, plan: StepPlan | None, work: Work) -> None:
        """Carry out (or submit) a step."""

    def hold(self, order: PoolOrder) -> None:
        """Follow the order of the step submitted last."""

    @property
    def state(self) -> PoolState:
        """What the pool holds."""

    def finish(self, step: int) -> None:
        """Wait until the step submitted as number ``step`` (from 0) is done; raise its errors."""


class DictMemory:
    """One layer of tags in Python, the plan carried out in order. The ring forgets every step."""

    def __init__(
        self, geometry: Geometry, block_size: int, restless: random.Random | None = None
    ) -> None:
        """The first chunk is there.

        Args:
            geometry: sizes.
            block_size: tokens of a block.
            restless: draws when a worker of its own pace takes a chunk, is refused one, or uses the
                leave to give all but one back; None takes all at once and gives nothing back.
        """
        self.boundary = geometry.resident_blocks
        self.pages = np.zeros((geometry.num_blocks, block_size), np.int64)
        self.rows = np.zeros((geometry.rows, block_size), np.int64)
        self.chunk_rows = geometry.chunk_rows
        self.chunks = 1
        self.order = PoolOrder(1)
        self.refused = self.released = 0
        self.restless = restless
        self.loads = NO_RUNS
        self.blocks_loaded = 0
        self.blocks_stored = 0
        self.late: list[tuple[int, int, int]] = []
        self.overwritten: list[tuple[int, int, int]] = []

    def run(self, plan: StepPlan | None, work: Work) -> None:
        self.take_and_give()
        self.pages[self.boundary :] = -1
        filled_first = plan is not None and plan.promotions_first and len(plan.promotions) > 0
        if not filled_first:
            check_free(work.free_before, self.pages)
        if plan is None or not (plan.stores_first or filled_first):
            self._write_free(work)
        if plan is not None:
            read = {row + i for _, row, count in plan.promotions.tolist() for i in range(count)}
            for block, row, count in plan.stores.tolist():
                assert block + count <= self.boundary
                assert not read & set(range(row, row + count)), "a row is stored over and promoted"
                assert row // self.chunk_rows < self.chunks, "a row of a chunk that is not there"
                self.rows[row : row + count] = self.pages[block : block + count]
                self.blocks_stored += count
            if not plan.stores_after_all:
                self._store_older(plan)
            if plan.loads is not None:
                self.loads = plan.loads
            if plan.stores_first and not filled_first:
                self._write_free(work)
            for block, row, count in (*plan.promotions.tolist(), *self.loads.tolist()):
                assert row // self.chunk_rows < self.chunks, "a row of a chunk that is gone"
                self.pages[block : block + count] = self.rows[row : row + count]
                self.blocks_loaded += count
            if len(plan.promotions) and not plan.after_all:
                for block, slot, tag in self.late:  # Of the step before, which is not over yet.
                    self.pages[block, slot] = tag
        if filled_first:
            check_free(work.free_before, self.pages)
            self._write_free(work)
        for block, slot, tag in work.writes:
            assert block < self.boundary, "a token is written into a pooled block"
            self.pages[block, slot] = tag
        check(work, self.pages)
        check_free(work.free_reads, self.pages)
        self.late = work.free_writes

    def _store_older(self, plan: StepPlan) -> None:
        """The stores have read pages before the step in front of this one wrote them."""
        rows = {b + i: r + i for b, r, count in plan.stores.tolist() for i in range(count)}
        for block, slot, tag in self.overwritten:
            if block in rows:
                self.rows[rows[block], slot] = tag

    def _write_free(self, work: Work) -> None:
        self.pages[work.zeroed] = 0
        self.overwritten = [(b, s, int(self.pages[b, s])) for b, s, _ in work.free_writes]
        for block, slot, tag in work.free_writes:
            self.pages[block, slot] = tag

    def expire(self) -> None:
        """Use the leave of the newest order: all chunks but the first go."""
        if self.order.idle and self.chunks > 1:
            self._keep(1)
            self.released += 1

    @property
    def state(self) -> PoolState:
        """What the pool holds."""
        return PoolState(self.chunks, self.refused, self.order.number, self.released)

    def hold(self, order: PoolOrder) -> None:
        """Hold as many chunks as ordered; what a chunk held is lost when it goes."""
        self.order = order
        self._keep(min(self.chunks, order.chunks))
        self.take_and_give()

    def take_and_give(self) -> None:
        """What the worker does beside the steps, as far as it comes."""
        rng = self.restless
        if rng is None:
            self.chunks = self.order.chunks
            return
        if rng.random() < 0.3:
            self.expire()
        elif self.order.idle:
            return
        while self.chunks < self.order.chunks and rng.random() < 0.6:
            if rng.random() < 0.1:
                self.refused += 1
                return
            self.chunks += 1

    def _keep(self, chunks: int) -> None:
        self.chunks = chunks
        self.rows[chunks * self.chunk_rows :] = -2

    def finish(self, step: int) -> None:
        """Every step is done when ``run`` returns."""


def check(work: Work, pages: np.ndarray, extra: int = 0) -> None:
    """Assert that every page read holds the tags of its request's tokens."""
    for request_id, block, tags in work.reads:
        found = pages[block, : len(tags)]
        assert np.array_equal(found, tags + extra), (
            f"request {request_id} reads foreign KV in block {block}: {found[:4]} is not {tags[:4]}"
        )


def check_free(reads: list[tuple[str, int, int, int]], pages: np.ndarray, extra: int = 0) -> None:
    """Assert the same of slots that groups without a pool read."""
    for request_id, block, slot, tag in reads:
        found = pages[block, slot]
        assert found == tag + extra, (
            f"request {request_id} reads foreign KV in slot {slot} of block {block}, of a group "
            "without a pool"
        )


class _State:
    def __init__(self, prompt: list[int], salt: str) -> None:
        self.salt = salt
        self.next = 0  # Position that the coming step begins with, once it was told.
        self.prompt = len(prompt)
        self.tokens = list(prompt)
        self.tags: list[int] = []
        self.tables: list[list[int]] = []
        self.extend_tags()

    def extend_tags(self) -> None:
        tag = self.tags[-1] if self.tags else 0
        for token in self.tokens[len(self.tags) :]:
            tag = next_tag(tag, token)
            self.tags.append(tag)

    def follow(self, count: int) -> None:
        """Know at least so many tokens: what the model answers behind those known."""
        while len(self.tokens) < count:
            self.tokens.append(next_token(self.tags[-1]))
            self.extend_tags()


class TagRunner:
    """Turns scheduler outputs into work for a memory, and makes up the sampled tokens.

    Attributes:
        weights: version of the model's; KV of one is of no use to another.
        salts: of requests; what may not share KV has different ones.
        proposed: drafts of the requests of the newest step, where they leave the runner.
        accepted: drafts so far that were accepted.
        rejected: drafts so far that were not.
    """

    def __init__(
        self,
        memory: Memory,
        block_size: int,
        pooled: int = 0,
        beside: Sequence[Group] = (),
        drafting: Drafting | None = None,
    ) -> None:
        """Over a memory.

        Args:
            memory: where the tags live.
            block_size: tokens of a block.
            pooled: index of the pooled group.
            beside: groups without a pool.
            drafting: how it drafts; None does not.
        """
        self.drafting = drafting
        self.proposed: dict[str, list[int]] = {}
        self.accepted = self.rejected = 0
        self.memory = memory
        self.block_size = block_size
        self.pooled = pooled
        self.beside = beside
        self.requests: dict[str, _State] = {}
        self.weights = 0
        self.salts: dict[str, str] = {}

    def execute(self, output: Any) -> ModelRunnerOutput:
        """Carry out one step (or submit it) and return what vLLM's runner would."""
        plan: StepPlan | None = output.pie.plan
        for request_id in output.finished_req_ids:
            self.requests.pop(request_id, None)
        if plan is not None:
            for request_id, first, blocks in plan.relabels:
                if request_id in output.finished_req_ids:
                    continue
                table = self.requests[request_id].tables[self.pooled]
                assert first + len(blocks) <= len(table)
                table[first : first + len(blocks)] = blocks
        due: dict[str, tuple[int, int]] = {}
        for new in output.scheduled_new_reqs:
            state = self.requests[new.req_id] = _State(
                list(new.prompt_token_ids), self.salts.get(new.req_id, "")
            )
            state.tables = [list(ids) for ids in new.block_ids]
            due[new.req_id] = (new.num_computed_tokens, state.prompt)
            state.next = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            state = self.requests[request_id]
            ids = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                state.tables = [list(group) for group in ids]
                state.next = cached.num_computed_tokens[i]
            elif ids is not None:
                for table, more in zip(state.tables, ids, strict=True):
                    table.extend(more)
            known = state.prompt + cached.num_output_tokens[i]
            due[request_id] = (cached.num_computed_tokens[i], known)
        return self._forward(output, plan, due)

    def _forward(
        self, output: Any, plan: StepPlan | None, due: dict[str, tuple[int, int]]
    ) -> ModelRunnerOutput:
        work = Work([], [], list(output.new_block_ids_to_zero or ()), [], [], [])
        sampled: list[list[int]] = []
        self.proposed = {}
        scheduled = output.num_scheduled_tokens
        for request_id, count in scheduled.items():
            state = self.requests[request_id]
            start, known = due[request_id]
            end = start + count
            if self.drafting is not None:
                drafts = output.scheduled_spec_decode_tokens.get(request_id, [])
                sampled.append(self._verify(work, request_id, (start, count, known), drafts))
                continue
            self._add(work, request_id, state, start, end)
            for group in self.beside:
                self._add_beside(work, group, request_id, state, (start, end))
            if end < known:
                sampled.append([])
                continue
            if end == len(state.tokens):
                state.tokens.append(next_token(state.tags[-1]))
                state.extend_tags()
            sampled.append([state.tokens[end]])
        self.memory.run(plan, work)
        self.memory.hold(output.pie.pool)
        ids = list(scheduled)
        result: Any = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={r: i for i, r in enumerate(ids)},
            sampled_token_ids=sampled,
        )
        result.pie = StepReport(Totals(), self.memory.state)
        return result

    def _verify(
        self, work: Work, request_id: str, due: tuple[int, int, int], drafts: list[int]
    ) -> list[int]:
        """Add a request's part of a step that verifies drafts; the tokens that it samples.

        Args:
            work: of the step.
            request_id: of the request.
            due: position of the first token, number of tokens, and of tokens known, for all that
                the scheduler knows: as if all drafts in flight were accepted.
            drafts: of the request; what stands for them where they never leave the runner.
        """
        state, drafting = self.requests[request_id], self.drafting
        assert drafting is not None
        start, count, known = due
        assert start >= state.next if drafting.asynchronous else start == state.next
        first, own = state.next, count - len(drafts)
        end = first + own
        if start + own < known:
            assert not drafts
            self._add(work, request_id, state, first, end)
            state.next = end
            return []
        state.follow(end + len(drafts) + drafting.tokens + 1)
        taken = accepted(drafts, state.tokens[end : end + len(drafts)])
        if drafting.asynchronous:
            taken = drafting.right(len(drafts))
        self.accepted += taken
        self.rejected += len(drafts) - taken
        state.next = end + taken
        self._add(work, request_id, state, first, state.next)
        table, size = state.tables[self.pooled], self.block_size
        for position in range(state.next, end + len(drafts) + drafting.lookahead):
            if position < len(table) * size:  # Where the longest context ends.
                work.writes.append((table[position // size], position % size, -7))
        if not drafting.asynchronous:
            following = state.tokens[state.next + 1 : state.next + 1 + drafting.tokens]
            self.proposed[request_id] = drafting.proposed(following)
        return state.tokens[end : state.next + 1]

    def _add(self, work: Work, request_id: str, state: _State, start: int, end: int) -> None:
        size = self.block_size
        mark = crc32(f"{self.weights} {state.salt}".encode()) & MASK
        for position in range(start, end):
            block = state.tables[self.pooled][position // size]
            work.writes.append((block, position % size, state.tags[position] ^ mark))
        for index in range(-(-end // size)):
            tags = np.array(state.tags[index * size : min(end, (index + 1) * size)], np.int64)
            work.reads.append((request_id, state.tables[self.pooled][index], tags ^ mark))

    def _add_beside(
        self, work: Work, group: Group, request_id: str, state: _State, step: tuple[int, int]
    ) -> None:
        """What a group without a pool does with the tokens ``step`` of a request."""
        size, table = self.block_size, state.tables[group.number]
        start, end = step
        mark = crc32(f"{self.weights} {state.salt} {group.number}".encode()) & MASK
        if not group.window:
            before, after = group.state_slots(table, start, end, size)
            for block, tokens in before:
                work.free_before.append((request_id, block, 0, state.tags[tokens - 1] ^ mark))
            for block, tokens in after:
                work.free_writes.append((block, 0, state.tags[tokens - 1] ^ mark))
                work.free_reads.append((request_id, block, 0, state.tags[tokens - 1] ^ mark))
            return
        for position in range(max(0, start - group.window + 1), end):
            block = table[position // size]
            assert block, "a window's block is not there"
            tag = state.tags[position] ^ mark
            if position >= start:
                work.free_writes.append((block, position % size, tag))
            work.free_reads.append((request_id, block, position % size, tag))

"""A model runner whose KV is tags, so that every page it reads can be checked.

It keeps block tables the way vLLM's V1 runner does (new requests bring whole
tables, running ones bring appended blocks, the plan brings relabels), writes
the tag of every token into the KV page that the table names, and reads all
pages of a request's context in every step. The tag of a token is a hash of all
tokens up to it, so a page with the KV of another request, of another position
or of an older time is noticed, while shared prefixes compare equal. In the pages
tags are mixed with the weights' version and the request's salt, so KV of older
weights or of another salt is noticed, too, though the tokens are the same.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import numpy as np
from vllm.v1.outputs import ModelRunnerOutput

from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS, PoolOrder, PoolState, StepPlan, StepReport, Totals

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
    """What a step's forward pass writes and must find."""

    writes: list[tuple[int, int, int]]
    """(block, slot, tag)."""
    reads: list[tuple[str, int, np.ndarray]]
    """(request, block, tags of the slots from 0)."""


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

    def run(self, plan: StepPlan | None, work: Work) -> None:
        self.take_and_give()
        self.pages[self.boundary :] = -1
        if plan is not None:
            read = {row + i for _, row, count in plan.promotions.tolist() for i in range(count)}
            for block, row, count in plan.stores.tolist():
                assert block + count <= self.boundary
                assert not read & set(range(row, row + count)), "a row is stored over and promoted"
                assert row // self.chunk_rows < self.chunks, "a row of a chunk that is not there"
                self.rows[row : row + count] = self.pages[block : block + count]
                self.blocks_stored += count
            if plan.loads is not None:
                self.loads = plan.loads
            for block, row, count in (*plan.promotions.tolist(), *self.loads.tolist()):
                assert row // self.chunk_rows < self.chunks, "a row of a chunk that is gone"
                self.pages[block : block + count] = self.rows[row : row + count]
                self.blocks_loaded += count
        for block, slot, tag in work.writes:
            assert block < self.boundary, "a token is written into a pooled block"
            self.pages[block, slot] = tag
        check(work, self.pages)

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


class _State:
    def __init__(self, prompt: list[int], salt: str) -> None:
        self.salt = salt
        self.prompt = len(prompt)
        self.tokens = list(prompt)
        self.tags: list[int] = []
        self.blocks: list[int] = []
        self.extend_tags()

    def extend_tags(self) -> None:
        tag = self.tags[-1] if self.tags else 0
        for token in self.tokens[len(self.tags) :]:
            tag = next_tag(tag, token)
            self.tags.append(tag)


class TagRunner:
    """Turns scheduler outputs into work for a memory, and makes up the sampled tokens.

    Attributes:
        weights: version of the model's; KV of one is of no use to another.
        salts: of requests; what may not share KV has different ones.
    """

    def __init__(self, memory: Memory, block_size: int) -> None:
        self.memory = memory
        self.block_size = block_size
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
                table = self.requests[request_id].blocks
                assert first + len(blocks) <= len(table)
                table[first : first + len(blocks)] = blocks
        due: dict[str, tuple[int, int]] = {}
        for new in output.scheduled_new_reqs:
            state = self.requests[new.req_id] = _State(
                list(new.prompt_token_ids), self.salts.get(new.req_id, "")
            )
            state.blocks = list(new.block_ids[0])
            due[new.req_id] = (new.num_computed_tokens, state.prompt)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            state = self.requests[request_id]
            ids = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                state.blocks = list(ids[0])
            elif ids is not None:
                state.blocks.extend(ids[0])
            known = state.prompt + cached.num_output_tokens[i]
            due[request_id] = (cached.num_computed_tokens[i], known)
        return self._forward(output, plan, due)

    def _forward(
        self, output: Any, plan: StepPlan | None, due: dict[str, tuple[int, int]]
    ) -> ModelRunnerOutput:
        work = Work([], [])
        sampled: list[list[int]] = []
        scheduled = output.num_scheduled_tokens
        for request_id, count in scheduled.items():
            state = self.requests[request_id]
            start, known = due[request_id]
            end = start + count
            self._add(work, request_id, state, start, end)
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

    def _add(self, work: Work, request_id: str, state: _State, start: int, end: int) -> None:
        size = self.block_size
        mark = crc32(f"{self.weights} {state.salt}".encode()) & MASK
        for position in range(start, end):
            block = state.blocks[position // size]
            work.writes.append((block, position % size, state.tags[position] ^ mark))
        for index in range(-(-end // size)):
            tags = np.array(state.tags[index * size : min(end, (index + 1) * size)], np.int64)
            work.reads.append((request_id, state.blocks[index], tags ^ mark))

"""Copies that fail at random, and a made-up model that answers wrong where it read wrong KV."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import numpy as np
from vllm.v1.outputs import ModelRunnerOutput

from pie_vllm.geometry import Geometry
from pie_vllm.plan import Runs, StepPlan, StepReport, Totals
from tests.helpers.drafts import accepted
from tests.helpers.states import Group
from tests.helpers.tagrunner import MASK, VOCABULARY, DictMemory, TagRunner

Slot = tuple[int, int, int]
"""Block, slot and tag."""

SPOILT = 0x2AAAAAAA


class FailingMemory(DictMemory):
    """As its base, but in some steps copies fail.

    Those of one direction, or all, stop at a random one, which may be torn; so do the loads where
    a store failed, as on a stream that waits for the one that failed.

    Attributes:
        share: of the steps with a plan, that fail.
        failed: whether the newest step did.
        failures: that there were.
    """

    def __init__(self, geometry: Geometry, block_size: int, share: float, seed: int) -> None:
        super().__init__(geometry, block_size)
        self.share = share
        self.failed = False
        self.failures = 0
        self._rng = random.Random(seed)

    def copy(self, plan: StepPlan | None) -> None:
        """Carry out a plan, or a part of it."""
        self.pages[self.boundary :] = -1
        self.failed = plan is not None and self._rng.random() < self.share
        self.failures += self.failed
        if plan is None:
            return
        if plan.loads is not None:
            self.loads = plan.loads
        for block, row in self._until_failure(plan.stores):
            self.rows[row] = self.pages[block]
        for block, row in self._until_failure(np.concatenate((plan.promotions, self.loads))):
            self.pages[block] = self.rows[row]

    def _until_failure(self, copies: Runs) -> Iterator[tuple[int, int]]:
        pairs = [
            (block + i, row + i) for block, row, count in copies.tolist() for i in range(count)
        ]
        if self.failed:
            del pairs[self._rng.randint(0, len(pairs)) :]
        yield from pairs


class HonestRunner(TagRunner):
    """A model that reads what is there: from wrong KV it makes wrong KV and a wrong token.

    So an answer is right only where every step counted whose context was right.
    """

    memory: FailingMemory

    def execute(self, output: Any) -> ModelRunnerOutput:
        """As the base; a request that comes back knows the tokens that were delivered, no more."""
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            if name in cached.resumed_req_ids:
                state = self.requests[name]
                known = state.prompt + cached.num_output_tokens[i]
                del state.tokens[known:], state.tags[known:]
        return super().execute(output)

    def _forward(
        self, output: Any, plan: StepPlan | None, due: dict[str, tuple[int, int]]
    ) -> ModelRunnerOutput:
        self.memory.copy(plan)
        sampled: list[list[int]] = []
        self.proposed = {}
        names = list(output.num_scheduled_tokens)
        for name, count in output.num_scheduled_tokens.items():
            state = self.requests[name]
            start, known = due[name]
            end = start + count
            if self.drafting is not None:
                drafts = output.scheduled_spec_decode_tokens.get(name, [])
                sampled.append(
                    self._read_and_verify(name, end - len(drafts) < known, count, drafts)
                )
                continue
            right = self._compute(name, start, end)
            if end < known:
                sampled.append([])
                continue
            if end == len(state.tokens):
                token = (state.tags[-1] * 31 + 7 + (not right)) % VOCABULARY
                state.tokens.append(token)
                state.extend_tags()
            sampled.append([state.tokens[end]])
        self.memory.hold(output.pie.pool)
        result: Any = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={r: i for i, r in enumerate(names)},
            sampled_token_ids=sampled,
        )
        failure = "injected" if self.memory.failed else ""
        result.pie = StepReport(Totals(), self.memory.state, failure=failure)
        return result

    def _read_and_verify(
        self, name: str, partial: bool, count: int, drafts: list[int]
    ) -> list[int]:
        """As ``_verify``, out of what is there; wrong KV makes a wrong token and accepts no draft.

        Args:
            name: of the request.
            partial: whether it has prompt tokens left after the step.
            count: tokens of the step.
            drafts: those among them that are to be verified.
        """
        state, drafting = self.requests[name], self.drafting
        assert drafting is not None
        first, end = state.next, state.next + count - len(drafts)
        state.follow(end + len(drafts) + drafting.tokens + 1)
        right = self._compute(name, first, end)
        state.next = end
        if partial:
            return []
        taken = accepted(drafts, state.tokens[end : end + len(drafts)])
        if drafting.asynchronous:
            taken = drafting.right(len(drafts))
        taken *= right
        self.accepted += taken
        self.rejected += len(drafts) - taken
        if taken:
            self._compute(name, end, end + taken)
        state.next = end + taken
        table, size = state.tables[0], self.block_size
        for position in range(state.next, end + len(drafts)):
            self.memory.pages[table[position // size], position % size] = SPOILT
        if not drafting.asynchronous:
            following = state.tokens[state.next + 1 : state.next + 1 + drafting.tokens]
            self.proposed[name] = drafting.proposed(following)
        if not right:
            return [(state.tokens[end] + 1) % VOCABULARY]
        return state.tokens[end : state.next + 1]

    def _compute(self, name: str, start: int, end: int) -> bool:
        """Write the KV of new tokens, which is right where that before them is."""
        state, size, pages = self.requests[name], self.block_size, self.memory.pages
        mark = crc32(f"{self.weights} {state.salt}".encode()) & MASK
        tags = np.array(state.tags[:end], np.int64) ^ mark
        blocks = state.tables[self.pooled]
        right = all(
            np.array_equal(pages[blocks[i], : len(part)], part)
            for i in range(-(-start // size))
            for part in [tags[i * size : min(start, (i + 1) * size)]]
        )
        beside = [self._beside(name, group, start, end) for group in self.beside]
        right &= all(pages[block, slot] == tag for reads, _ in beside for block, slot, tag in reads)
        wrong = 0 if right else SPOILT
        for position in range(start, end):
            block = blocks[position // size]
            assert block < self.memory.boundary, "a token is written into a pooled block"
            pages[block, position % size] = tags[position] ^ wrong
        for block, slot, tag in (write for _, writes in beside for write in writes):
            pages[block, slot] = tag ^ wrong
        return right

    def _beside(
        self, name: str, group: Group, start: int, end: int
    ) -> tuple[list[Slot], list[Slot]]:
        """What a group without a pool reads of earlier tokens, and what it writes."""
        state, size = self.requests[name], self.block_size
        table = state.tables[group.number]
        mark = crc32(f"{self.weights} {state.salt} {group.number}".encode()) & MASK
        if not group.window:
            before, after = group.state_slots(table, start, end, size)
            return (
                [(block, 0, state.tags[tokens - 1] ^ mark) for block, tokens in before],
                [(block, 0, state.tags[tokens - 1] ^ mark) for block, tokens in after],
            )
        reach = range(max(0, start - group.window + 1), end)
        slots = [(table[p // size], p % size, state.tags[p] ^ mark) for p in reach]
        return slots[: start - reach.start], slots[start - reach.start :]

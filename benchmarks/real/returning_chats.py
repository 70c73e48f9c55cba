"""Chats that come back over a modelled GPU: how long the scheduler's steps take, stock and pie."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from benchmarks.harness.stats import percentile
from benchmarks.real.modelled_side import ModelledSide
from benchmarks.real.scheduler_side import BLOCK_SIZE, StepTimes, steady_heap
from benchmarks.simulated.gpu_machines import H200

CHAT_TOKENS = 8192
"""Mean number of tokens of a chat's history; from 0.8 to 1.5 times as many in a single one."""

ARRIVAL_SECONDS = 0.02
"""Seconds between the first arrivals of two chats."""


class ChatsCost(NamedTuple):
    """One side, microseconds of CPU time.

    Attributes:
        p50, p99, max: of ``schedule``.
        whole_p99: of the whole step.
        over_gpu: number of steps whose scheduler takes longer than the GPU.
        steps: number of steps measured.
        running: mean number of running requests.
        gpu_ms: median time of a step on the GPU, milliseconds, by the model.
        restored: number of blocks found parked.
    """

    p50: float
    p99: float
    max: float
    whole_p99: float
    over_gpu: int
    steps: int
    running: float
    gpu_ms: float
    restored: int


class _Chats:
    """Histories that grow with each turn, and the times at which the next turns come."""

    def __init__(self, chats: int, tokens: int, haste: float) -> None:
        self._haste = haste
        self._rng = random.Random(5)
        self._tokens = tokens
        self._turns = 0
        self._chat_of: dict[str, int] = {}
        self._histories = [
            [(i * 31 + t) % 997 + 3 for t in range(int(tokens * self._rng.uniform(0.8, 1.2)))]
            for i in range(chats)
        ]
        for i, history in enumerate(self._histories):
            history[0] = 2000 + i
        order = list(range(chats))
        self._rng.shuffle(order)
        self._coming = [(ARRIVAL_SECONDS * place, i) for place, i in enumerate(order)]
        heapq.heapify(self._coming)

    def arrive(self, side: ModelledSide) -> None:
        """Add the turns that are due; where nothing runs, the clock goes on to the next one."""
        while self._coming and (
            self._coming[0][0] <= side.clock or not side.scheduler.has_requests()
        ):
            due, chat = heapq.heappop(self._coming)
            side.clock = max(side.clock, due)
            history = self._histories[chat]
            if len(history) > 1.5 * self._tokens:
                del history[self._tokens :]
                history[0] = 3000 + self._turns
            asked = self._rng.randint(30, 200)
            history += [(self._turns * 7 + t) % 997 + 3 for t in range(asked)]
            name = f"{chat}.{self._turns}"
            self._turns += 1
            self._chat_of[name] = chat
            answer = self._rng.randint(100, 300)
            side.add(name, list(history), max(1, int(answer / self._haste)))

    def leave(self, side: ModelledSide) -> None:
        """Have the chats whose turns ended come again after a pause."""
        for name in side.finished:
            chat = self._chat_of.pop(name)
            self._histories[chat] += [7] * 200
            pause = self._rng.uniform(2, 30) / self._haste
            heapq.heappush(self._coming, (side.clock + pause, chat))


def chats_cost(
    *,
    pie: bool,
    chats: int,
    steps: int,
    tokens: int = CHAT_TOKENS,
    kv_bytes: int = H200.kv_bytes,
    haste: float = 1.0,
) -> ChatsCost:
    """Steps of one side, after as many warm-up steps as all chats take to come first.

    Args:
        pie: whether it is pie's scheduler.
        chats: number of chats.
        steps: number of steps that count.
        tokens: mean length of a history.
        kv_bytes: device memory for KV, in bytes.
        haste: factor by which answers, of 100 to 300 tokens, and pauses, of 2 to 30 s, are shorter.
    """
    machine = replace(H200, kv_bytes=kv_bytes)
    side = ModelledSide(machine, 2 * tokens // BLOCK_SIZE, pie=pie)
    load = _Chats(chats, tokens, haste)

    def step() -> StepTimes:
        load.arrive(side)
        times = side.step()
        load.leave(side)
        return times

    for _ in range(chats + chats // 2):
        step()
    times, gpu, running = [], [], []
    with steady_heap():
        for _ in range(steps):
            times.append(step())
            gpu.append(side.step_seconds)
            running.append(len(side.scheduler.running))
    counts = getattr(side.scheduler.kv_cache_manager, "hit_counts", None)
    return _cost(times, gpu, running, counts.hits.parked if counts else 0)


def _cost(
    times: Sequence[StepTimes], gpu: Sequence[float], running: Sequence[int], restored: int
) -> ChatsCost:
    schedule = [t.schedule / 1e3 for t in times]
    return ChatsCost(
        median(schedule),
        percentile(schedule, 99),
        max(schedule),
        percentile([t.whole / 1e3 for t in times], 99),
        sum(t.whole / 1e9 > seconds for t, seconds in zip(times, gpu, strict=True)),
        len(times),
        sum(running) / len(running),
        1e3 * median(gpu),
        restored,
    )

"""Brings the requests of a source to an engine in this process, and notes when answers come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.stats import percentile
from benchmarks.real.arrivals import Ask, Source


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        ask: the request that is answered.
        times: times of its tokens, in seconds after the load began.
        tokens: ids of the answer's tokens.
    """

    ask: Ask
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.ask.due

    @property
    def latency(self) -> float:
        """Time to the last token."""
        return self.times[-1] - self.ask.due


def answer_all(
    engine: Any,
    source: Source,
    add: Callable[[Ask], None],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> list[Answer]:
    """Step `engine` until the source has nothing more and all is answered.

    Requests that are due are added between steps. Time waits for the engine: one that falls due
    during a step is added after it, and counts from when it was due.

    Args:
        engine: a vLLM engine, or what has its `step` and `has_unfinished_requests`.
        source: where the requests come from.
        add: gives one to the engine.
        clock: seconds.
        sleep: waits some seconds.
    """
    answers: dict[str, Answer] = {}
    begin = clock()
    while True:
        while (ask := source.take(clock() - begin)) is not None:
            answers[ask.name] = Answer(ask)
            add(ask)
        if not engine.has_unfinished_requests():
            due = source.next_due()
            if due is None:
                return list(answers.values())
            sleep(max(0.0, due - (clock() - begin)))
            continue
        outputs = engine.step()
        now = clock() - begin
        for output in outputs:
            answer = answers[output.request_id]
            answer.times.append(now)
            answer.tokens = list(output.outputs[0].token_ids)
            if output.finished:
                source.answered(answer.ask, answer.tokens)


def figures(answers: Sequence[Answer], first_turn: int = 0) -> dict[str, Any]:
    """Throughput over all; percentiles of the answers from `first_turn` of their chats on."""
    seconds = max(answer.times[-1] for answer in answers)
    tokens = [answer.tokens for answer in answers]
    counted = [answer for answer in answers if answer.ask.turn >= first_turn]
    first = [1e3 * answer.first for answer in counted]
    latency = [answer.latency for answer in counted]
    return {
        "tok_s": sum(map(len, tokens)) / seconds,
        "requests_s": len(answers) / seconds,
        "seconds": seconds,
        "ttft_p50_ms": percentile(first, 50),
        "ttft_p99_ms": percentile(first, 99),
        "latency_p50_s": percentile(latency, 50),
        "latency_p99_s": percentile(latency, 99),
        "latencies_s": sorted(latency),
        "ttfts_ms": sorted(first),
        "tokens": tokens,
    }

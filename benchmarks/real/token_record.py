"""Which tokens a scheduler has computed, and which of them it had computed before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.real.in_process import scheduler_of


class TokenRecord:
    """Counts tokens by their places in their requests.

    Attributes:
        prompt: tokens of the prompt that were computed, by request; prefix hits are not among them.
        again: tokens of all requests that were computed a second time or more often.
    """

    def __init__(self) -> None:
        """Nothing is computed yet."""
        self.prompt: dict[str, int] = {}
        self.again = 0
        self._computed: dict[str, int] = {}

    def add(self, name: str, prompt_tokens: int, start: int, count: int) -> None:
        """A step computes `count` tokens of a request from its token number `start` on."""
        end = start + count
        of_prompt = max(0, min(end, prompt_tokens) - start)
        self.prompt[name] = self.prompt.get(name, 0) + of_prompt
        furthest = self._computed.get(name, start)
        self.again += max(0, min(furthest, end) - start)
        self._computed[name] = max(furthest, end)


def watch_tokens(llm: Any) -> TokenRecord:
    """A record that each step of an engine in this process, stock's or pie's, adds to."""
    scheduler = scheduler_of(llm)
    states = llm.llm_engine.output_processor.request_states
    update = scheduler.update_from_output
    record = TokenRecord()

    def updated(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            record.add(
                states[request_id].external_req_id,
                scheduler.requests[request_id].num_prompt_tokens,
                starts[request_id],
                count,
            )
        return update(scheduler_output, *args, **kwargs)

    scheduler.update_from_output = updated
    return record


@contextmanager
def watched_tokens(llm: Any) -> Iterator[TokenRecord]:
    """A record that each step inside the block adds to, and no step after it."""
    scheduler = scheduler_of(llm)
    update = scheduler.update_from_output
    try:
        yield watch_tokens(llm)
    finally:
        scheduler.update_from_output = update

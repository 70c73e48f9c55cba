"""Time between tokens: of all chats, and apart for tokens that were made with pooled KV."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.stats import curve, percentile
from benchmarks.real.in_process import scheduler_of


def watch_pooled(llm: Any) -> set[str]:
    """A set that holds, after each step of a pie engine, the chats that had pooled blocks in it.

    It is filled when the step's tokens are there and no finished chat has given its blocks back:
    a look into a dict for each request. A block that the step promotes is resident in it. With two
    steps in flight it would be the blocks of a step later; in one process vLLM has one in flight.
    """
    engine = llm.llm_engine
    scheduler = scheduler_of(llm)
    read_set = scheduler.kv_cache_manager.residency.read_set
    states = engine.output_processor.request_states
    update = scheduler.update_from_output
    chats: set[str] = set()

    def updated(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        chats.clear()
        scheduled = scheduler_output.num_scheduled_tokens
        chats.update(states[name].external_req_id for name in scheduled if read_set.pooled(name))
        return update(scheduler_output, *args, **kwargs)

    scheduler.update_from_output = updated
    return chats


def gap_figures(
    times: Sequence[Sequence[float]], pooled: Sequence[Sequence[bool]]
) -> dict[str, Any]:
    """Percentiles and curves of the gaps, in milliseconds.

    Args:
        times: seconds of each token of each chat.
        pooled: whether it was made with pooled KV. Where none was there is one class only.
    """
    every: list[float] = []
    classes: dict[str, list[float]] = {"pooled": [], "resident": []}
    for chat, held in zip(times, pooled, strict=True):
        gaps = [(after - before) * 1e3 for before, after in itertools.pairwise(chat)]
        every += gaps
        for gap, with_pooled in zip(gaps, held[1:], strict=True):
            classes["pooled" if with_pooled else "resident"].append(gap)
    found = _figures("itl", every)
    if classes["pooled"]:
        for name, gaps in classes.items():
            found |= _figures(f"itl_{name}", gaps)
    return found


def _figures(name: str, gaps: Sequence[float]) -> dict[str, Any]:
    if not gaps:
        return {}
    return {
        f"{name}_p50_ms": percentile(gaps, 50),
        f"{name}_p99_ms": percentile(gaps, 99),
        f"{name}_count": len(gaps),
        f"{name}_curve_ms": curve(gaps),
    }

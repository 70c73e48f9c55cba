"""Two engines that serve chats without any reuse, in turns of a few steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.display import working
from benchmarks.harness.rounds import Figures
from benchmarks.real.arrivals import SingleChats
from benchmarks.real.one_run import make_llm, pie_counters, preemptions
from benchmarks.real.parking_run import add_ask
from benchmarks.real.side import Side, serve, sides
from benchmarks.real.token_record import watch_tokens


def child(spec: dict[str, Any]) -> None:
    """In a child: start an engine with all chats waiting, then run the steps of each turn.

    Asked for no steps it answers with the figures of the load.
    """
    llm = make_llm(spec)
    with_pie = spec["pie"] is not None
    before, pie_before = preemptions(llm), pie_counters(llm) if with_pie else {}
    record = watch_tokens(llm)
    for ask in SingleChats(**spec["load"]["single"]).asks(None):
        add_ask(llm, ask)
    engine = llm.llm_engine

    def turn(steps: int) -> dict[str, Any]:
        if not steps:
            found: dict[str, Any] = {
                "preemptions": preemptions(llm) - before,
                "recomputed_tokens": record.again,
                "prefill_tokens": sum(record.prompt.values()),
            }
            if with_pie:
                found |= {"pie_before": pie_before, "pie": pie_counters(llm)}
            return found
        tokens = 0
        start = time.perf_counter()
        for _ in range(steps):
            if not engine.has_unfinished_requests():
                break
            tokens += len(engine.step())
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "left": engine.has_unfinished_requests()}

    serve(turn)


def take_turns(engines: Mapping[str, Side], steps: int) -> dict[str, Figures]:
    """Turns until one engine is done, the order changed each time; the figures of each.

    Raises:
        RuntimeError: an engine ended; names it.
    """
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    names = list(engines)
    while all(not found or found[-1]["left"] for found in turns.values()):
        names.reverse()
        for name in names:
            turns[name].append(_ask(engines, name, steps))
    figures = {}
    for name, found in turns.items():
        figures[name] = _ask(engines, name, 0)
        seconds = sum(each["seconds"] for each in found)
        figures[name]["tok_s"] = sum(each["tokens"] for each in found) / seconds
        figures[name]["turns"] = [(each["seconds"], each["tokens"]) for each in found]
    return figures


def _ask(engines: Mapping[str, Side], name: str, steps: int) -> dict[str, Any]:
    answer: dict[str, Any] | None = engines[name].turn(steps)
    if answer is None:
        raise RuntimeError(f"the engine {name} ended; see its log in build/runs")
    return answer


def run_churn(
    specs: Mapping[str, dict[str, Any]], steps: int, repeats: int
) -> dict[str, list[Figures]]:
    """Figures of each side, round by round; the engines of a round take turns of `steps` steps."""
    figures: dict[str, list[Figures]] = {name: [] for name in specs}
    for index in range(repeats):
        with sides("parking", specs, f"-fresh-{index}") as engines, working("taking turns"):
            for name, found in take_turns(engines, steps).items():
                figures[name].append(found)
    return figures

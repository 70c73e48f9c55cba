"""What the stage `graphs` makes of the steps of its engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.harness.compute import middle
from benchmarks.gpu.harness.context import Context
from benchmarks.harness.stats import paired_ratio

IDLE, STREAMING = 1.005, 1.01
"""Steps of pie beside stock's, at most."""

DROPPED = 2
"""First steps of a turn, which hold what came before it."""


def steps_of(
    turns: Sequence[Mapping[str, Any]], answers: int | None = None
) -> list[tuple[float, int]]:
    """Steps without the first of each turn; only those with so many answers."""
    kept = [step for turn in turns for step in turn["steps"][DROPPED:]]
    return [(s, n) for s, n in kept if answers is None or n == answers]


def medians(turns: Sequence[Mapping[str, Any]], answers: int | None = None) -> list[float]:
    """The median step of each turn."""
    return [middle([seconds for seconds, _ in steps_of([turn], answers)]) for turn in turns]


def modes_of(turns: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Steps by graph mode."""
    found: dict[str, int] = {}
    for turn in turns:
        for mode, count in turn["modes"].items():
            found[mode] = found.get(mode, 0) + count
    return found


def report_idle(context: Context, found: Mapping[str, list[dict[str, Any]]], side: str) -> None:
    """Steps of a side of idle pie beside stock's."""
    ratio = paired_ratio(medians(found[side]), medians(found["stock_all"]))
    for name, turns in found.items():
        steps = [seconds for seconds, _ in steps_of(turns)]
        context.report.row(
            "idle: decode steps with all KV on the device",
            name=name,
            steps=len(steps),
            median_ms=1e3 * middle(steps),
            graph_modes=str(modes_of(turns)),
            stored_MiB=sum(turn.get("bytes_stored", 0) for turn in turns) / 2**20,
        )
    context.report.check(
        f"idle step of {side} beside stock's",
        ratio.text(4),
        f"<= {IDLE}",
        ratio.median <= IDLE,
        target=True,
    )
    ours, theirs = modes_of(found[side]), modes_of(found["stock_all"])
    if theirs:
        same = set(ours) == set(theirs)
        context.report.check(f"graph modes of {side}", sorted(ours), str(sorted(theirs)), same)
    elif not context.dry:
        context.report.note("vLLM reported no graph modes")


def report_streaming(
    context: Context,
    chats: int,
    found: Mapping[str, list[dict[str, Any]]],
    link: float,
    side: str,
) -> None:
    """Steps of a streaming side beside stock's with all KV on the device, all chats running."""
    for name, turns in found.items():
        whole, steps = steps_of(turns, chats), steps_of(turns)
        count = max(1, sum(len(turn["steps"]) for turn in turns))
        loaded = sum(turn.get("bytes_loaded", 0) for turn in turns)
        taken = sum(seconds for turn in turns for seconds, _ in turn["steps"])
        context.report.row(
            "streaming: decode steps, pie with less device memory",
            name=name,
            steps=len(steps),
            with_all_chats=len(whole),
            median_ms=1e3 * middle([seconds for seconds, _ in steps]),
            median_with_all_ms=1e3 * middle([seconds for seconds, _ in whole]),
            loaded_MiB_a_step=loaded / count / 2**20,
            share_of_link=loaded / (link * taken),
            steps_with_plan=sum(t.get("steps_with_plan", 0) for t in turns),
            graph_steps=sum(t.get("graph_steps", 0) for t in turns),
            stall_ms_a_step=1e3 * sum(t.get("stall_seconds", 0.0) for t in turns) / count,
            graph_modes=str(modes_of(turns)),
        )
    loaded = sum(turn.get("bytes_loaded", 0) for turn in found[side])
    context.report.check(
        f"{side}: bytes loaded while streaming", loaded, "> 0", loaded > 0, target=context.dry
    )
    if side == "pie_full":
        count = sum(turn.get("graph_steps", 0) for turn in found[side])
        context.report.check("steps that streamed in FULL graphs", count, "> 0", count > 0)
    pairs = [
        (a, b)
        for a, b in zip(
            medians(found[side], chats), medians(found["stock_all"], chats), strict=False
        )
        if a == a and b == b  # Turns without a step of all chats have none.
    ]
    if not pairs:
        context.report.note(f"no step of {side} ran all chats: requests took turns")
        return
    ratio = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    name = f"streaming step of {side} beside stock's, all chats running"
    ok = ratio.median <= STREAMING
    context.report.check(name, ratio.text(4), f"<= {STREAMING}", ok, target=True)

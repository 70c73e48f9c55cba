"""The simulator's steps are those of vLLM's scheduler, on the same trace and machine.

Both call the same policy; what this shows is that they call it in the same way, with the same
blocks, and that the simulated scheduler is vLLM's in what the policy sees of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pie_vllm.policy.admission.chunk import Chunk
from tests.helpers.served_trace import Step, Trace, random_trace, served, simulated

pytestmark = pytest.mark.vllm

KINDS: dict[str, dict[str, Any]] = {
    "no window to speak of": {"pooled": 8, "budget": 100.0, "parking": False},
    "slow link": {"pooled": 60, "budget": 6.0, "parking": False},
    "fast link": {"pooled": 60, "budget": 100.0, "parking": False},
    "slow link, parking": {"pooled": 40, "budget": 6.0, "parking": True},
    "fast link, parking": {"pooled": 40, "budget": 100.0, "parking": True},
    "slow link, no cache": {"pooled": 8, "budget": 6.0, "parking": True, "caching": False},
    "fast link, no cache": {"pooled": 8, "budget": 100.0, "parking": True, "caching": False},
}


def first_difference(ours: list[Step], theirs: list[Step]) -> str | None:
    """The first step in which two runs differ, by field; None if they are the same."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            fields = (
                f"{n}: {a}\n  not {b}"
                for n, a, b in zip(Step._fields, one, other, strict=True)
                if a != b
            )
            return f"step {number}: " + "\n  ".join(fields)
    return None if len(ours) == len(theirs) else f"{len(ours)} steps, not {len(theirs)}"


def trace_of(kind: str, seed: int) -> Trace:
    """A trace by name."""
    return random_trace(seed, **KINDS[kind])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_the_simulator_plays_the_steps_of_the_server(kind: str, seed: int) -> None:
    """Bounds, who runs, who is admitted, who waits for a turn, and the copies, block by block."""
    trace = trace_of(kind, seed)
    ours, theirs = simulated(trace), served(trace)
    assert first_difference(ours, theirs) is None
    assert ours[-1].demotions > 0


def test_the_traces_have_what_is_compared() -> None:
    """Promotions, turns, restores, more than one admission a step, and requests that come back."""
    steps = [step for kind in KINDS for step in simulated(trace_of(kind, 0))]
    assert any(step.promotions for step in steps)
    assert any(step.left_out for step in steps)
    assert any(step.orders.restored for step in steps)
    assert any(len(step.fresh) > 1 for step in steps)
    admitted = [step.fresh for step in simulated(trace_of("no window to speak of", 0))]
    names = [name for fresh in admitted for name in fresh]
    assert len(names) > len(set(names)), "nobody was preempted"
    assert any(step.orders.plan and len(step.orders.plan.stores) for step in steps)
    assert any(step.orders.restored for step in simulated(trace_of("fast link, no cache", 0)))


CONTROLS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "headroom": (
        "policy.controller.tail_room",
        lambda running, size: running // size + 3,
        "slow link",
    ),
    "promised": ("policy.admission.admission_room.promised", lambda *_: 2, "slow link"),
    "parts": (
        "policy.admission.transaction.restored_at_once",
        lambda *_: 1,
        "fast link, parking",
    ),
    "chunk": ("policy.controller.decide_chunk", lambda *_: Chunk(16, 1), "no window to speak of"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_side_that_decides_otherwise_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: another headroom of promotion, residents kept, parts, or chunk."""
    where, other, kind = CONTROLS[name]
    found = []
    for seed in range(3):
        trace = trace_of(kind, seed)
        theirs = served(trace)
        with monkeypatch.context() as patched:
            patched.setattr(f"pie_vllm.{where}", other)
            found.append(first_difference(simulated(trace), theirs))
    assert any(found)

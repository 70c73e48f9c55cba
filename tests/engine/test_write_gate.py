"""A layer whose KV write passed no gate: the step that copies pages fails by name."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import GateError
from tests.engine.driving import View, inject, plan, run_step

LAYERS = range(6)
STORES: dict[str, Any] = {"stores": ((3, 0, 1),)}
PROMOTES: dict[str, Any] = {"promotions": ((2, 9, 1),)}
EACH = [("before_write", "before_attention", "after_attention")] * 6


def passes(engine: TransferEngine, calls: list[tuple[str, ...]]) -> None:
    """A layer's calls each."""
    for layer, names in enumerate(calls):
        for name in names:
            getattr(engine, name)(layer)


def fused(*layers: int) -> list[tuple[str, ...]]:
    """The calls where these layers write without their gate."""
    return [names[1:] if layer in layers else names for layer, names in enumerate(EACH)]


@pytest.mark.parametrize("copies", [STORES, PROMOTES, {**STORES, **PROMOTES}])
@pytest.mark.parametrize(
    ("calls", "text"),
    [
        (fused(*LAYERS), "without the gate of their KV write: layers 0, 1, 2, 3, 4, 5. Such"),
        (fused(4), r"step 7 passed 6 gates of 6; without the gate of their KV write: layers 4\. "),
        ([*EACH[:5], ("before_write", *EACH[5])], "KV written more than once: layers 5"),
        (
            [(*EACH[0][1:], EACH[0][0]), *EACH[1:]],
            "with KV written after their attention: layers 0",
        ),
    ],
)
def test_a_write_without_its_gate_fails_the_step(
    engine: TransferEngine, copies: dict[str, Any], calls: list[tuple[str, ...]], text: str
) -> None:
    """Not before the end: then all such layers are named. The next step is sound."""
    View(engine).write_row(9, 5)
    engine.begin_step(plan(7, **copies))
    passes(engine, calls)
    with pytest.raises(GateError, match=text) as caught:
        engine.end_step()
    assert "--block-manager default" in str(caught.value)
    assert "another layer's KV" not in str(caught.value)
    run_step(engine, plan(8, **copies))


def test_a_step_that_only_loads_needs_no_gate_of_writes(engine: TransferEngine) -> None:
    """Its copies go to pooled pages, which no layer writes."""
    for step in (plan(1, loads=((8, 0, 1),)), plan(2, loads=None), plan(3)):
        engine.begin_step(step)
        passes(engine, fused(*LAYERS))
        assert engine.end_step().gates == 6


def test_both_kinds_of_gates_are_named(engine: TransferEngine) -> None:
    engine.begin_step(plan(1, **STORES))
    passes(engine, [*EACH[:2], ("before_write",), *EACH[3:5], EACH[5][1:]])
    wanted = (
        "passed 5 gates of 6; without their gate: layers 2; without the gate of their KV "
        r"write: layers 5\. What such a layer read .* KV\. Such a layer may have written"
    )
    with pytest.raises(GateError, match=wanted):
        engine.end_step()


def test_a_failed_step_lets_no_later_write_overtake_its_stores(
    engine: TransferEngine,
) -> None:
    """Its stores are over when the error is raised."""
    view = View(engine)
    view.write_all(3, 1)
    inject(engine, "late", direction="store", milliseconds=10)
    engine.begin_step(plan(1, **STORES))
    passes(engine, fused(*LAYERS))
    with pytest.raises(GateError):
        engine.end_step()
    view.write_all(3, 2)
    engine.drain()
    assert all(view.row_holds(0, layer, 1) for layer in LAYERS)

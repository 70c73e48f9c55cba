"""Negative controls: each way to break the engine shows, here and in its self-test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import GateError, TransferError
from tests.engine.driving import View, host_only, inject, plan, run_step

LAYERS = range(6)
LATE = 50
"""Milliseconds that a copy is late: more than a busy machine keeps the test from looking."""

MakeEngine = Callable[..., TransferEngine]


def gathered(engine: TransferEngine) -> tuple[list[bool], list[bool]]:
    """Per layer: whether the ring page held its row in step 2, and the row its store."""
    view, seen = View(engine), []
    view.write_all(1, 11)
    view.write_row(5, 55)
    step = plan(1, stores=((1, 0, 1),), loads=((8, 5, 1),))
    run_step(engine, step)
    engine.abort_step()  # drains: late copies of step 1 do not read what follows
    view.write_row(5, 66)
    run_step(
        engine, plan(2, loads=None), attend=lambda layer: seen.append(view.holds(layer, 8, 66))
    )
    engine.abort_step()
    return seen, [view.row_holds(0, layer, 11) for layer in LAYERS]


def test_without_a_negative_control(make_engine: MakeEngine) -> None:
    assert gathered(make_engine()) == ([True] * 6, [True] * 6)
    assert gathered(make_engine(debug=("poison",))) == ([True] * 6, [True] * 6)


def test_skip_loads(make_engine: MakeEngine) -> None:
    assert gathered(make_engine(debug=("skip_loads",))) == ([False] * 6, [True] * 6)


def test_skip_stores(make_engine: MakeEngine) -> None:
    assert gathered(make_engine(debug=("skip_stores",))) == ([True] * 6, [False] * 6)


@pytest.mark.races
def test_late_submit(make_engine: MakeEngine) -> None:
    engine = make_engine(debug=("late_submit",))
    inject(engine, "late", direction="load", milliseconds=LATE)
    assert gathered(engine)[0] == [False] * 6


@pytest.mark.races
def test_skip_gate(make_engine: MakeEngine) -> None:
    engine = make_engine(debug=("skip_gate",))
    inject(engine, "late", direction="load", milliseconds=LATE)
    view, seen = View(engine), []
    view.write_row(5, 55)
    with pytest.raises(GateError, match="passed 5 gates of 6; without their gate: layers 3"):
        run_step(
            engine,
            plan(1, loads=((8, 5, 1),)),
            attend=lambda layer: seen.append(view.holds(layer, 8, 55)),
        )
    assert seen == [True, True, True, False, True, True]


def test_poison_fills_what_is_not_loaded(make_engine: MakeEngine) -> None:
    engine = make_engine(debug=("poison",))
    view, seen = View(engine), []
    run_step(
        engine,
        plan(1, loads=((8, 5, 1),)),
        attend=lambda layer: seen.append(bool((view.page(layer, 9) == 0xFF).all())),
    )
    assert seen == [True] * 6


@pytest.mark.parametrize(
    "word", ["skip_loads", "skip_stores", pytest.param("late_submit", marks=pytest.mark.races)]
)
def test_self_test_finds_a_broken_hand_over(make_engine: MakeEngine, word: str) -> None:
    engine = make_engine(debug=(word,))
    # So that a load that nobody waits for cannot win by chance.
    inject(engine, "late", direction="load", milliseconds=LATE)
    with pytest.raises(TransferError, match="self-test"):
        engine.self_test()
    assert not View(engine).bytes.any()


@host_only
def test_self_test_reports_a_failing_copy(engine: TransferEngine) -> None:
    inject(engine, "fail", direction="load", nth=9)
    with pytest.raises(TransferError):
        engine.self_test()
    engine.self_test()

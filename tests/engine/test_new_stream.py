"""A compute stream that is new comes after the old one and after all copies (rule 3)."""

from __future__ import annotations

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from tests.engine.driving import View, inject, plan, run_step
from tests.helpers.streams import DriverStream

OLD, NEW = 11, 22
LAYERS = range(6)
DELAY = 0.02


@pytest.fixture
def other(engine: TransferEngine) -> DriverStream:
    """The new one."""
    return DriverStream(engine)


def test_its_stores_come_after_the_old_compute(
    engine: TransferEngine, stream: DriverStream, other: DriverStream, view: View
) -> None:
    view.write_all(3, OLD)
    run_step(engine, plan(1), attend=view.late_write(3, NEW, DELAY), stream=stream)
    run_step(engine, plan(2, stores=((3, 0, 1),)), stream=other)
    other.synchronize()
    engine.drain()
    assert all(view.row_holds(0, layer, NEW) for layer in LAYERS)


def test_it_comes_after_the_stores_of_a_step(
    engine: TransferEngine, stream: DriverStream, other: DriverStream, view: View
) -> None:
    view.write_all(3, OLD)
    inject(engine, "late", direction="store", milliseconds=15)
    run_step(engine, plan(1, stores=((3, 0, 1),)), stream=stream)
    run_step(engine, plan(2), write=lambda layer: view.write(layer, 3, NEW), stream=other)
    other.synchronize()
    stream.synchronize()
    engine.drain()
    assert all(view.row_holds(0, layer, OLD) for layer in LAYERS)


def test_it_comes_after_the_old_compute(
    engine: TransferEngine, stream: DriverStream, other: DriverStream, view: View
) -> None:
    """The step copied nothing."""
    view.write_all(3, OLD)
    seen: list[bool] = []
    run_step(engine, plan(1), attend=view.late_write(3, NEW, DELAY), stream=stream)
    run_step(
        engine, plan(2), attend=lambda layer: seen.append(view.holds(layer, 3, NEW)), stream=other
    )
    other.synchronize()
    stream.synchronize()
    assert seen == [True] * 6


def test_it_comes_after_the_stores_of_an_idle_step(
    engine: TransferEngine, stream: DriverStream, other: DriverStream, view: View
) -> None:
    view.write_all(3, OLD)
    inject(engine, "late", direction="store", milliseconds=15)
    engine.run_idle(plan(1, stores=((3, 0, 1),), forward=False), stream.id)
    run_step(engine, plan(2), write=lambda layer: view.write(layer, 3, NEW), stream=other)
    other.synchronize()
    engine.drain()
    assert all(view.row_holds(0, layer, OLD) for layer in LAYERS)


def test_it_comes_after_the_promotions_of_an_idle_step(
    engine: TransferEngine, stream: DriverStream, other: DriverStream, view: View
) -> None:
    view.write_row(0, NEW)
    inject(engine, "late", direction="load", milliseconds=15)
    engine.run_idle(plan(1, promotions=((3, 0, 1),), forward=False), stream.id)
    seen: list[bool] = []
    run_step(
        engine, plan(2), attend=lambda layer: seen.append(view.holds(layer, 3, NEW)), stream=other
    )
    other.synchronize()
    engine.drain()
    assert seen == [True] * 6

"""Each order rule of csrc/DESIGN.md, with delays that expose its absence."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from tests.engine.driving import View, inject, latched, plan, run_step
from tests.helpers.streams import DriverStream

OLD, NEW, OTHER = 11, 22, 33
LAYERS = range(6)
DELAY = 0.03


def rows_hold(view: View, row: int, tag: int) -> list[int]:
    """Layers where the row does not hold the tag."""
    return [layer for layer in LAYERS if not view.row_holds(row, layer, tag)]


def settle(engine: TransferEngine, stream: DriverStream) -> None:
    stream.synchronize()
    engine.abort_step()


def test_store_waits_for_the_last_compute_on_its_pages(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    view.write_all(3, OLD)
    run_step(engine, plan(1), attend=view.late_write(3, NEW, DELAY), stream=stream)
    run_step(engine, plan(2, stores=((3, 0, 1),)), stream=stream)
    settle(engine, stream)
    assert rows_hold(view, 0, NEW) == []


def test_store_waits_for_earlier_loads_of_its_rows(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    view.write_row(0, OLD)
    view.write_all(3, NEW)
    inject(engine, "late", direction="load", milliseconds=20)
    engine.run_idle(plan(1, promotions=((1, 0, 1),), forward=False), stream.id)
    run_step(engine, plan(2, stores=((3, 0, 1),)), stream=stream)
    settle(engine, stream)
    assert rows_hold(view, 0, NEW) == []
    assert all(view.holds(layer, 1, OLD) for layer in LAYERS)


@pytest.mark.parametrize("slow_layer", LAYERS)
def test_load_waits_for_the_last_user_of_its_slot(
    engine: TransferEngine, stream: DriverStream, view: View, slow_layer: int
) -> None:
    for row in range(4):
        view.write_row(row, row + 1)
    wrong: list[tuple[int, int]] = []

    def reader(first_row: int) -> Callable[[int], None]:
        def attend(layer: int) -> None:
            if layer == slow_layer:
                time.sleep(DELAY)
            wrong.extend(
                (layer, i) for i in (0, 1) if not view.holds(layer, 8 + i, first_row + i + 1)
            )

        return attend

    run_step(engine, plan(1, loads=((8, 0, 2),)), attend=reader(0), stream=stream)
    run_step(engine, plan(2, loads=((8, 2, 2),)), attend=reader(2), stream=stream)
    run_step(engine, plan(3, loads=None), attend=reader(2), stream=stream)
    settle(engine, stream)
    assert wrong == []


def test_load_waits_for_the_stores_of_its_rows(engine: TransferEngine, view: View) -> None:
    view.write_all(3, NEW)
    view.write_row(0, OLD)
    inject(engine, "late", direction="store", milliseconds=15)
    seen = []
    step = plan(1, stores=((3, 0, 1),), loads=((8, 0, 1),))
    run_step(engine, step, attend=lambda layer: seen.append(view.holds(layer, 8, NEW)))
    assert seen == [True] * 6


def test_promotion_waits_for_the_store_from_its_page(engine: TransferEngine, view: View) -> None:
    view.write_all(3, OLD)
    view.write_row(1, NEW)
    inject(engine, "late", direction="store", milliseconds=15)
    seen = []
    step = plan(1, stores=((3, 0, 1),), promotions=((3, 1, 1),))
    run_step(engine, step, attend=lambda layer: seen.append(view.holds(layer, 3, NEW)))
    assert seen == [True] * 6
    assert rows_hold(view, 0, OLD) == []


def test_promotion_waits_for_the_last_compute_on_its_page(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    view.write_all(3, OLD)
    view.write_row(1, NEW)
    seen = []

    def slow(layer: int) -> None:
        time.sleep(DELAY)
        seen.append(view.holds(layer, 3, OLD))

    run_step(engine, plan(1), attend=slow, stream=stream)
    step = plan(2, promotions=((3, 1, 1),))
    run_step(
        engine, step, attend=lambda layer: seen.append(view.holds(layer, 3, NEW)), stream=stream
    )
    settle(engine, stream)
    assert seen == [True] * 12


def test_copies_wait_for_ungated_compute_before_them(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    run_step(engine, plan(1), stream=stream)
    with latched(stream):
        for layer in LAYERS:
            stream.launch(lambda layer=layer: view.write(layer, 3, NEW))
        run_step(engine, plan(3, stores=((3, 0, 1),)), stream=stream)
        time.sleep(DELAY)
    settle(engine, stream)
    assert rows_hold(view, 0, NEW) == []


def test_copies_wait_for_compute_after_an_abort(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """Though the next step has the next number: what was aborted may run again without a plan."""
    view.write_all(3, OLD)
    engine.begin_step(plan(1), stream.id)
    engine.abort_step()
    stream.launch(lambda: (time.sleep(DELAY), view.write_all(3, NEW)))
    run_step(engine, plan(2, stores=((3, 0, 1),)), stream=stream)
    settle(engine, stream)
    assert rows_hold(view, 0, NEW) == []


def test_loads_wait_for_ungated_compute_before_them(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    view.write_row(0, NEW)
    seen = []
    with latched(stream):
        stream.launch(lambda: seen.append(view.page(0, 8).any()))
        run_step(engine, plan(2, loads=((8, 0, 1),)), stream=stream)
        time.sleep(DELAY)
    settle(engine, stream)
    assert seen == [False]


@pytest.mark.parametrize("fault", ["late", "torn"])
def test_write_waits_for_the_stores_of_its_layer(
    engine: TransferEngine, view: View, fault: str
) -> None:
    view.write_all(3, OLD)
    inject(engine, fault, direction="store", milliseconds=10)
    step = plan(1, stores=((3, 0, 1),))
    run_step(engine, step, write=lambda layer: view.write(layer, 3, NEW))
    engine.abort_step()
    assert rows_hold(view, 0, OLD) == []


@pytest.mark.parametrize("fault", ["late", "torn"])
@pytest.mark.parametrize("inline", [True, False])
def test_attention_waits_for_the_loads_of_its_layer(
    engine: TransferEngine, stream: DriverStream, view: View, fault: str, inline: bool
) -> None:
    view.write_row(0, OLD)
    view.write_row(1, NEW)
    inject(engine, fault, direction="load", milliseconds=10)
    seen = []

    def attend(layer: int) -> None:
        seen.append(view.holds(layer, 8, OLD) and view.holds(layer, 4, NEW))

    step = plan(1, promotions=((4, 1, 1),), loads=((8, 0, 1),))
    run_step(engine, step, attend=attend, stream=None if inline else stream)
    settle(engine, stream)
    assert seen == [True] * 6


def test_compute_after_an_idle_step_waits_for_its_copies(
    engine: TransferEngine, view: View
) -> None:
    view.write_all(3, OLD)
    view.write_row(1, NEW)
    inject(engine, "late", milliseconds=10)
    stats = engine.run_idle(plan(1, stores=((3, 0, 1),), promotions=((4, 1, 1),), forward=False))
    assert all(view.holds(layer, 4, NEW) for layer in LAYERS)
    view.write_all(3, OTHER)
    assert rows_hold(view, 0, OLD) == []
    assert (stats.bytes_stored, stats.bytes_loaded, stats.gates) == (6000, 6000, 0)


def test_compute_after_an_idle_step_waits_for_its_stores(
    engine: TransferEngine, view: View
) -> None:
    view.write_all(3, OLD)
    inject(engine, "late", milliseconds=10)
    engine.run_idle(plan(1, stores=((3, 0, 1),), forward=False))
    view.write_all(3, OTHER)
    engine.abort_step()
    assert rows_hold(view, 0, OLD) == []


def test_an_idle_step_loads_no_ring_pages(engine: TransferEngine, view: View) -> None:
    view.write_row(0, OLD)
    stats = engine.run_idle(plan(1, loads=((8, 0, 1),), forward=False))
    assert stats.bytes_loaded == 0
    assert not any(view.page(layer, 8).any() for layer in LAYERS)
    seen = []
    run_step(
        engine, plan(2, loads=None), attend=lambda layer: seen.append(view.holds(layer, 8, OLD))
    )
    assert seen == [True] * 6


def test_a_row_freed_in_one_step_is_stored_over_in_the_next(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    view.write_row(0, OLD)
    view.write_all(3, NEW)
    inject(engine, "late", direction="load", milliseconds=10)
    seen = []

    def reader(tag: int) -> Callable[[int], None]:
        return lambda layer: seen.append(view.holds(layer, 8, tag))

    run_step(engine, plan(1, loads=((8, 0, 1),)), attend=reader(OLD), stream=stream)
    step = plan(2, stores=((3, 0, 1),), loads=((8, 0, 1),))
    run_step(engine, step, attend=reader(NEW), stream=stream)
    settle(engine, stream)
    assert seen == [True] * 12


def test_begin_step_does_not_wait_for_asynchronous_compute(
    engine: TransferEngine, stream: DriverStream
) -> None:
    with latched(stream):
        for step in (1, 2):
            run_step(engine, plan(step, stores=((0, 0, 2),), loads=((8, 0, 2),)), stream=stream)
    settle(engine, stream)


def test_loads_run_ahead_of_the_compute(engine: TransferEngine, view: View) -> None:
    view.write_row(0, OLD)
    engine.submit_head_first(False)
    engine.begin_step(plan(1, loads=((8, 0, 1),)))
    deadline = time.monotonic() + 5
    while not view.holds(1, 8, OLD) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert view.holds(0, 8, OLD)
    assert view.holds(1, 8, OLD)  # before any gate was called
    engine.abort_step()

"""Rules 13 to 18 of csrc/DESIGN.md: each replay also passes the race check of the stand-in."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from tests.engine.driving import View, inject, latched, plan, run_step
from tests.engine.graphing import LAYERS, PIECES, GraphModel, Seen
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.streams import DriverStream

MakeEngine = Callable[..., TransferEngine]
Capture = Callable[..., GraphModel]
pytestmark = pytest.mark.usefixtures("kernel")


def comes(what: Callable[[], bool]) -> bool:
    """Whether it is so within five seconds."""
    deadline = time.monotonic() + 5
    while not what() and time.monotonic() < deadline:
        time.sleep(0.001)
    return what()


def test_ring_loads_wait_for_the_attention_before(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    view.write_row(0, 3)
    seen = Seen(view, b8=3)

    def slow(layer: int) -> None:
        time.sleep(0.01)
        seen(layer)

    model.run(plan(1, loads=((8, 0, 1),)), attend=slow)
    stream.synchronize()
    seen.check()


def test_attention_waits_for_the_loads_of_its_layer(
    model: GraphModel, stream: DriverStream, view: View, kernel: GatherKernel
) -> None:
    view.write_row(0, 3)
    kernel.wait(10)
    seen = Seen(view, b8=3)
    model.run(plan(1, loads=((8, 0, 1),)), attend=seen)
    stream.synchronize()
    seen.check()


def test_the_replay_waits_for_the_head(model: GraphModel, stream: DriverStream, view: View) -> None:
    view.write_row(0, 3)
    inject(model.engine, "late", direction="load", milliseconds=15)
    seen = Seen(view, b8=3)
    model.run(plan(1, loads=((8, 0, 1),)), attend=seen)
    stream.synchronize()
    seen.check()


def test_the_head_is_loaded_before_the_replay(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    """In the gap between two steps: as soon as the step begins, and not by the graph."""
    view.write_row(0, 3)
    view.write_row(1, 5)
    step = plan(1, promotions=((3, 1, 1),), loads=((8, 0, 1),))
    assert model.engine.begin_step(step, stream.id, graph=True)
    model.engine.drain()
    assert [view.holds(layer, 8, 3) for layer in (0, 1)] == [True, False]
    assert [view.holds(layer, 3, 5) for layer in (0, 1)] == [True, False]
    view.write(0, 3, 6)
    model.engine.graphs.enter()
    model.launch()
    model.engine.end_step()
    stream.synchronize()
    assert view.holds(0, 3, 6)


def test_the_loads_of_a_replay_begin_before_its_first_write(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    """So many as the ring has room for, beside the first layer's."""
    view.write_row(0, 3)
    found = []

    def write(layer: int) -> None:
        if layer == 0:
            found.append(comes(lambda: view.holds(1, 8, 3)))

    model.run(plan(1, loads=((8, 0, 1),)), write=write)
    stream.synchronize()
    assert found == [True]


def test_the_replay_waits_for_the_stores(
    capture: Capture, engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """Its writes, and its loads of the rows."""
    model = capture(engine, stream, written=(1,))
    view.write_all(1, 3)
    inject(model.engine, "late", direction="store", milliseconds=10)
    seen = Seen(view, b8=3)
    step = plan(1, stores=((1, 0, 1),), loads=((8, 0, 1),))
    model.run(step, write=lambda layer: view.write(layer, 1, 4), attend=seen)
    stream.synchronize()
    model.engine.drain()
    seen.check()
    assert all(view.row_holds(0, layer, 3) for layer in LAYERS)


def test_later_stores_wait_for_the_replay(
    capture: Capture, engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """They take what it wrote, and go to rows that it read."""
    model = capture(engine, stream, written=(1,))
    view.write_row(0, 3)
    seen = Seen(view, b8=3)

    def write(layer: int) -> None:
        time.sleep(0.005)
        view.write(layer, 1, 4)

    model.run(plan(1, loads=((8, 0, 1),)), write=write, attend=seen)
    model.run(plan(2, stores=((1, 0, 1),)))
    stream.synchronize()
    model.engine.drain()
    seen.check()
    assert all(view.row_holds(0, layer, 4) for layer in LAYERS)


@pytest.mark.parametrize("graph", [True, False])
def test_later_loads_wait_for_the_replay(
    model: GraphModel, stream: DriverStream, view: View, graph: bool
) -> None:
    """The head's, and those of a piecewise step: the ring is in use until then."""
    view.write_row(0, 3)
    view.write_row(1, 4)
    first, second = Seen(view, b8=3), Seen(view, b8=4)

    def slow(layer: int) -> None:
        time.sleep(0.005)
        first(layer)

    model.run(plan(1, loads=((8, 0, 1),)), attend=slow)
    if graph:
        model.run(plan(2, loads=((8, 1, 1),)), attend=second)
    else:
        run_step(model.engine, plan(2, loads=((8, 1, 1),)), attend=second, stream=stream)
    stream.synchronize()
    first.check()
    second.check()


def test_the_head_does_not_wait_for_what_follows_the_replay(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    """Sampling: the next step's first loads run beside it."""
    view.write_row(0, 3)
    model.run(plan(1))
    with latched(stream):
        assert model.engine.begin_step(plan(2, loads=((8, 0, 1),)), stream.id, graph=True)
        assert comes(lambda: view.holds(0, 8, 3))
    model.engine.abort_step()


def test_the_head_waits_for_what_follows_the_replay_if_told_to(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    """Rule 25: drafters, and layers without gates, may use the page until then."""
    view.write_row(0, 5)
    model.run(plan(1))
    with latched(stream):
        step = plan(2, promotions=((3, 0, 1),), after_all=True)
        assert model.engine.begin_step(step, stream.id, graph=True)
        time.sleep(0.03)
        assert not view.page(0, 3).any()
    model.engine.graphs.enter()
    model.launch()
    model.engine.end_step()
    stream.synchronize()
    assert all(view.holds(layer, 3, 5) for layer in LAYERS)


@pytest.mark.parametrize("stores_first", [True, False])
def test_compute_ahead_of_the_replay_waits_for_the_stores(
    model: GraphModel, stream: DriverStream, view: View, stores_first: bool
) -> None:
    """Rule 24: blocks are zeroed and copied between ``begin_step`` and the launch."""
    view.write_all(3, 3)
    inject(model.engine, "late", direction="store", milliseconds=10)
    step = plan(1, stores=((3, 0, 1),), stores_first=stores_first)
    assert model.engine.begin_step(step, stream.id, graph=True)
    stream.launch(lambda: view.write_all(3, 4))
    model.engine.graphs.enter()
    model.launch()
    model.engine.end_step()
    stream.synchronize()
    model.engine.drain()
    assert all(view.row_holds(0, layer, 3) for layer in LAYERS) is stores_first


@pytest.mark.parametrize("before", range(3))
def test_a_new_compute_stream_comes_after_the_replay(
    capture: Capture, engine: TransferEngine, stream: DriverStream, view: View, before: int
) -> None:
    """Its tables too: they are emptied first, of the newest of all steps."""
    model, other = capture(engine, stream), capture(engine, DriverStream(engine))
    for step in range(before):
        model.run(plan(step + 1))
    view.write_row(0, 3)
    view.write_row(1, 4)
    first, second = Seen(view, b8=3), Seen(view, b8=4)

    def slow(layer: int) -> None:
        time.sleep(0.005)
        first(layer)

    model.run(plan(before + 1, loads=((8, 0, 1),)), attend=slow)
    other.run(plan(before + 2, loads=((8, 1, 1),)), attend=second)
    other.stream.synchronize()
    stream.synchronize()
    first.check()
    second.check()


def test_a_chunk_is_given_back_only_after_the_replay(
    make_engine: MakeEngine, capture: Capture, kernel: GatherKernel
) -> None:
    """The replay reads its rows; the stand-in sees memory that goes too early."""
    engine = make_engine()
    engine.graphs.prepare(IMAGE, PIECES)
    stream, view = DriverStream(engine), View(engine)
    model = capture(engine, stream)
    view.write_row(7, 3)
    seen = Seen(view, b8=3)
    kernel.wait(3)
    model.run(plan(1, loads=((8, 7, 1),)), attend=seen)
    engine.release_chunk(1)
    stream.synchronize()
    seen.check()


def test_tables_are_not_written_while_a_replay_may_read_them(
    model: GraphModel, stream: DriverStream, view: View, kernel: GatherKernel
) -> None:
    """More steps than staging buffers, faster than they run; the fixture compares the tables."""
    for row in range(10):
        view.write_row(row, 1 + row)
    found = []
    kernel.wait(0.5)
    for step in range(1, 21):
        row = step % 9
        found.append(Seen(view, b8=1 + row, b9=2 + row))
        model.run(plan(step, loads=((8, row, 1), (9, row + 1, 1))), attend=found[-1])
    stream.synchronize()
    for seen in found:
        seen.check()


def test_steps_in_flight_do_not_block(model: GraphModel, stream: DriverStream, view: View) -> None:
    view.write_row(0, 3)
    view.write_row(1, 4)
    found = [Seen(view, b8=3 + i % 2) for i in range(3)]
    with latched(stream):
        for i, seen in enumerate(found):
            model.run(plan(i + 1, loads=((8, i % 2, 1),)), attend=seen)
        assert not any(seen.layers for seen in found)
    stream.synchronize()
    for seen in found:
        seen.check()


def test_a_write_comes_after_the_promotion_of_its_page(
    model: GraphModel, stream: DriverStream, view: View, kernel: GatherKernel
) -> None:
    """The layer's kernel is joined before its KV write, in the head before the launch."""
    view.write_row(0, 5)
    kernel.wait(2)
    model.run(plan(1, promotions=((3, 0, 1),)), write=lambda layer: view.write(layer, 3, 6))
    stream.synchronize()
    assert [layer for layer in LAYERS if not view.holds(layer, 3, 6)] == []


# Aborts.


@pytest.mark.parametrize("launched", [True, False])
def test_promotions_of_an_aborted_step_are_made(
    model: GraphModel, stream: DriverStream, view: View, launched: bool, kernel: GatherKernel
) -> None:
    view.write_row(0, 5)
    kernel.wait(2)
    assert model.engine.begin_step(plan(1, promotions=((3, 0, 1),)), stream.id, graph=True)
    model.engine.graphs.enter()
    if launched:
        model.launch()
    model.engine.abort_step()
    assert all(view.holds(layer, 3, 5) for layer in LAYERS)
    seen = Seen(view, b8=5, b3=5)
    model.run(plan(2, loads=((8, 0, 1),)), attend=seen)
    stream.synchronize()
    seen.check()


def test_a_chunk_that_came_back_elsewhere(make_engine: MakeEngine, capture: Capture) -> None:
    """The same runs mean other addresses then: the tables are written again."""
    engine = make_engine()
    engine.graphs.prepare(IMAGE, PIECES)
    stream, view = DriverStream(engine), View(engine)
    model = capture(engine, stream)
    for step in range(1, 4):
        view.write_row(7, step)
        seen = Seen(view, b8=step)
        model.run(plan(step, loads=((8, 7, 1),)), attend=seen)
        stream.synchronize()
        seen.check()
        engine.release_chunk(1)
        held = [DriverStream(engine) for _ in range(step)]  # whose stacks take the addresses
        engine.commit_chunk(1)
        for other in held:
            other.close()

"""Statistics, gates, aborts and link speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import GateError, IntegrityError, TransferError
from tests.engine.driving import View, host_only, inject, plan, run_step
from tests.helpers.streams import DriverStream

LAYERS = range(6)
MakeEngine = Callable[..., TransferEngine]


def test_stats_of_a_step(engine: TransferEngine) -> None:
    engine.self_test()
    before = [counters(engine, direction) for direction in ("load", "store")]
    step = plan(
        7, stores=((0, 0, 2), (4, 7, 1)), promotions=((3, 5, 1),), loads=((8, 0, 2), (11, 4, 1))
    )
    stats = run_step(engine, step)
    row = engine.geometry.row_bytes
    assert (stats.step, stats.gates, stats.copies) == (7, 6, 5 * 6)
    assert (stats.bytes_loaded, stats.bytes_stored, stats.bytes_promoted) == (4 * row, 3 * row, row)
    assert stats.load_seconds > 0
    assert stats.store_seconds > 0
    after = [counters(engine, direction) for direction in ("load", "store")]
    moved = [new.bytes - old.bytes for new, old in zip(after, before, strict=True)]
    assert moved == [4 * row, 3 * row]
    assert [n.copies - o.copies for n, o in zip(after, before, strict=True)] == [18, 12]


@pytest.mark.alone
def test_an_empty_step_moves_nothing(engine: TransferEngine) -> None:
    stats = run_step(engine, plan(1))
    assert stats[1:5] == (0, 0, 0.0, 0.0)
    assert (stats.gates, stats.copies) == (6, 0)
    assert stats.stall_seconds < 1e-3


def test_same_loads_as_before(engine: TransferEngine) -> None:
    view, seen = View(engine), []
    view.write_row(0, 9)
    for step, loads in enumerate((((8, 0, 1),), None, None), 1):
        engine.zero_ring()
        run_step(
            engine,
            plan(step, loads=loads),
            attend=lambda layer: seen.append(view.holds(layer, 8, 9)),
        )
    assert seen == [True] * 18


def test_same_loads_after_a_gap_is_refused(engine: TransferEngine) -> None:
    run_step(engine, plan(1, loads=((8, 0, 1),)))
    with pytest.raises(IntegrityError, match="step before"):
        engine.begin_step(plan(3, loads=None))
    run_step(engine, plan(2))
    run_step(engine, plan(5, loads=None))  # of a step that loaded nothing: nothing


@pytest.mark.alone
@host_only
def test_link_speed(make_engine: MakeEngine) -> None:
    engine = make_engine(link_bytes_per_s=50e6, page_bytes=50_000, num_layers=4)
    stats = run_step(engine, plan(1, loads=((8, 0, 4),)))  # 0.8 MB: 16 ms
    # The upper bounds leave room for a busy machine.
    assert 0.016 <= stats.load_seconds < 0.06
    assert 0.010 <= stats.stall_seconds < 0.10
    stats = engine.run_idle(plan(2, stores=((0, 0, 4),), promotions=((4, 5, 4),), forward=False))
    assert 0.016 <= stats.store_seconds < 0.06


@pytest.mark.alone
@host_only
def test_copies_of_one_direction_share_the_link(make_engine: MakeEngine) -> None:
    engine = make_engine(link_bytes_per_s=10e6, page_bytes=50_000)
    streams = [DriverStream(engine) for _ in range(2)]
    at, start = engine.arena.address, time.monotonic()
    for stream in streams:
        stream.copy("load", at, at + 100_000, 100_000)
    for stream in streams:
        stream.synchronize()
    assert 0.02 <= time.monotonic() - start < 0.15


@host_only
def test_stall_is_the_time_that_gates_block(engine: TransferEngine) -> None:
    inject(engine, "late", direction="load", milliseconds=20)
    start = time.monotonic()
    stats = run_step(engine, plan(1, loads=((8, 0, 1),)))
    assert 0.1 <= stats.stall_seconds <= time.monotonic() - start


@pytest.mark.alone
def test_waits_release_the_interpreter_lock(engine: TransferEngine) -> None:
    inject(engine, "late", direction="load", milliseconds=100)
    engine.begin_step(plan(1, loads=((8, 0, 1),)))
    ticks, stop = [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(1)
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        engine.before_attention(0)
    finally:
        count = len(ticks)
        stop.set()
        thread.join()
    assert count >= 10
    engine.abort_step()


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ([0, 1, 2, 3, 5], "without their gate: layers 4"),
        ([], "without their gate: layers 0, 1, 2, 3, 4, 5"),
        ([0, 1, 2, 2, 3, 4, 5], "more than once: layers 2"),
        ([0, 2, 1, 3, 4, 5], "out of order"),
    ],
)
def test_missed_gate(engine: TransferEngine, calls: list[int], text: str) -> None:
    view = View(engine)
    view.write_row(3, 5)
    engine.begin_step(plan(1, promotions=((2, 3, 1),), loads=((8, 0, 1),)))
    for layer in calls:
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    with pytest.raises(GateError, match=text):
        engine.end_step()
    assert all(view.holds(layer, 2, 5) for layer in LAYERS)
    run_step(engine, plan(2, loads=None))


def test_only_the_first_of_many_layers_are_named(make_engine: MakeEngine) -> None:
    engine = make_engine(num_layers=18)
    engine.begin_step(plan(1))
    with pytest.raises(GateError, match=r"layers 0, 1, .*, 15, \.\.\.\. What"):
        engine.end_step()


def test_gates_need_a_step_and_a_layer(engine: TransferEngine) -> None:
    for call in (engine.before_attention, engine.after_attention):
        with pytest.raises(TransferError, match="begin_step"):
            call(0)
    with pytest.raises(TransferError, match="begin_step"):
        engine.end_step()
    engine.begin_step(plan(1))
    with pytest.raises(GateError, match="no layer 6"):
        engine.before_attention(6)
    with pytest.raises(TransferError, match="inside step 1"):
        engine.begin_step(plan(2))
    for call in (engine.self_test, engine.zero_ring):
        with pytest.raises(TransferError, match="inside a step"):
            call()
    engine.abort_step()


@pytest.mark.parametrize("reached", [0, 1, 3, 6])
def test_abort_leaves_rows_and_pages_consistent(engine: TransferEngine, reached: int) -> None:
    view = View(engine)
    view.write_all(1, 11)
    view.write_row(9, 22)
    inject(engine, "late", milliseconds=5)
    step = plan(1, stores=((1, 0, 1),), promotions=((2, 9, 1),), loads=((8, 0, 1),))
    engine.begin_step(step)
    for layer in range(reached):
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    engine.abort_step()
    for layer in LAYERS:
        assert view.row_holds(0, layer, 11)
        assert view.holds(layer, 2, 22)
    seen = []
    run_step(
        engine, plan(2, loads=None), attend=lambda layer: seen.append(view.holds(layer, 8, 11))
    )
    assert seen == [True] * 6


def test_abort_without_a_step(engine: TransferEngine) -> None:
    engine.abort_step()
    engine.abort_step()
    run_step(engine, plan(1))


@host_only
@pytest.mark.parametrize("direction", ["load", "store"])
@pytest.mark.parametrize("nth", [1, 4, 12])
@pytest.mark.parametrize("inline", [True, False])
def test_a_failing_copy_is_an_error_and_never_a_hang(
    engine: TransferEngine, direction: str, nth: int, inline: bool
) -> None:
    view = View(engine)
    stream = None if inline else DriverStream(engine)
    inject(engine, "fail", direction=direction, nth=nth)
    step = plan(1, stores=((0, 0, 1), (2, 2, 1)), promotions=((4, 8, 1),), loads=((8, 0, 1),))

    def some_steps() -> None:
        for number in range(1, 4):
            run_step(engine, step._replace(step=number), stream=stream)
            if stream:
                time.sleep(0.02)

    with pytest.raises(TransferError, match="injected fault"):
        some_steps()
    engine.abort_step()
    view.write_row(0, 7)
    seen = []
    run_step(
        engine,
        plan(9, loads=((8, 0, 1),)),
        attend=lambda layer: seen.append(view.holds(layer, 8, 7)),
        stream=stream,
    )
    if stream:
        stream.synchronize()
    assert seen == [True] * 6


@host_only
def test_a_failed_engine_refuses_steps_until_aborted(engine: TransferEngine) -> None:
    inject(engine, "fail", direction="store")
    with pytest.raises(TransferError, match="stream of stores: injected fault"):
        engine.run_idle(plan(1, stores=((0, 0, 1),), forward=False))
    engine.abort_step()
    stats = engine.run_idle(plan(1, stores=((0, 0, 1),), forward=False))
    assert stats.bytes_stored == 6000


@host_only
def test_a_failed_engine_closes(make_engine: MakeEngine) -> None:
    engine = make_engine()
    inject(engine, "fail", nth=3)
    engine.begin_step(plan(1, loads=((8, 0, 1),), stores=((0, 0, 1),)))
    engine.close()
    engine.close()
    assert engine.handle.address is None
    with pytest.raises(TransferError, match="closed"):
        engine.begin_step(plan(2))
    with pytest.raises(TransferError, match="closed"):
        engine.arena.tensor()


@pytest.mark.parametrize("fault", ["late", "torn"])
def test_write_waits_for_the_promotions_of_its_layer(
    engine: TransferEngine, stream: DriverStream, view: View, fault: str
) -> None:
    """A page that is not full is filled and written in one step: the write is the newer."""
    view.write_row(0, 1)
    inject(engine, fault, direction="load", milliseconds=10)
    step = plan(1, promotions=((3, 0, 1),))
    run_step(engine, step, write=lambda layer: view.write(layer, 3, 2), stream=stream)
    stream.synchronize()
    assert all(view.holds(layer, 3, 2) for layer in range(engine.geometry.num_layers))

"""Steps in CUDA graphs, over the stand-in: what a replay copies, and what it does not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pie_vllm.errors import ConfigError, GateError, TransferError, UnsupportedError
from pie_vllm.transfer.engine import TransferEngine
from pie_vllm.transfer.streams import DriverStream, counters
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.standin import load
from tests.transfer.driving import View, geometry, inject, latched, plan, run_step
from tests.transfer.graphing import GraphModel

MakeEngine = Callable[..., TransferEngine]
Capture = Callable[..., GraphModel]
pytestmark = pytest.mark.usefixtures("kernel")
LAYERS = range(6)
PIECES = 4
FIRST = 8
"""The first pooled block."""


@pytest.fixture(params=["cuda"])
def driver(driver: str) -> str:
    """Only this one."""
    return driver


@pytest.fixture
def engine(make_engine: MakeEngine) -> TransferEngine:
    """Six layers on a ring of two; graphs of four pieces a layer."""
    engine = make_engine()
    engine.use_graphs(IMAGE, PIECES)
    return engine


@pytest.fixture
def model(capture: Capture, engine: TransferEngine, stream: DriverStream) -> GraphModel:
    """One that writes nothing."""
    return capture(engine, stream)


class Seen:
    """Layers whose attention ran, and those that did not find what blocks must hold."""

    def __init__(self, view: View, **holds: int) -> None:
        self.view = view
        self.holds = {int(block[1:]): tag for block, tag in holds.items()}
        self.layers: list[int] = []
        self.wrong: list[tuple[int, int]] = []

    def __call__(self, layer: int) -> None:
        self.layers.append(layer)
        self.wrong += [
            (layer, block)
            for block, tag in self.holds.items()
            if not self.view.holds(layer, block, tag)
        ]

    def check(self) -> None:
        assert (self.wrong, self.layers) == ([], list(LAYERS))


def test_each_replay_loads_what_its_plan_says(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    for row in range(10):
        view.write_row(row, 1 + row)
    plans = [
        ((8, 0, 2),),
        ((8, 4, 1), (9, 3, 1), (10, 2, 1), (11, 1, 1)),
        (),
        ((11, 9, 1),),
        ((8, 0, 2), (10, 7, 2)),
    ]
    for step, loads in enumerate(plans, 1):
        holds = {f"b{b + i}": 1 + row + i for b, row, n in loads for i in range(n)}
        seen = Seen(view, **holds)
        stats = model.run(plan(step, loads=loads), attend=seen)
        stream.synchronize()
        seen.check()
        runs, blocks = len(loads), sum(n for _, _, n in loads)
        assert (stats.gates, stats.copies, stats.bytes_loaded) == (6, 6 * runs, 6000 * blocks)
        assert (stats.stall_step, stats.stall_seconds) == (-1, 0)


def test_a_piece_of_every_layer_is_that_layers_own(model: GraphModel, view: View) -> None:
    """Rows of a last chunk that is smaller, too."""
    view.write_row(4, 40)
    view.write_row(9, 90)
    seen = Seen(view, b8=40, b9=90)
    model.run(plan(1, loads=((8, 4, 1), (9, 9, 1))), attend=seen)
    model.stream.synchronize()
    seen.check()


def test_the_loads_of_the_step_before(
    model: GraphModel, stream: DriverStream, view: View, kernel: GatherKernel
) -> None:
    """The tables are not written again; a piecewise step and one without a plan lie between."""
    view.write_row(0, 7)
    copies = load().calls("cuMemcpy2DAsync")
    found = []
    for step in (1, 2):
        found.append(Seen(view, b8=7))
        model.run(plan(step, loads=None if step > 1 else ((8, 0, 1),)), attend=found[-1])
    found.append(Seen(view, b8=7))
    run_step(model.engine, plan(3, loads=None), attend=found[-1], stream=stream)
    found.append(Seen(view, b8=7))
    model.launch()
    model.run(plan(5, loads=((8, 0, 1),)), attend=found[-1])
    stream.synchronize()
    for seen in found:
        seen.check()
    # One table; three headers there, three counts back.
    assert load().calls("cuMemcpy2DAsync") - copies == 1 + 3 + 3


def test_a_replay_without_a_plan_loads_nothing(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    """Nor does one after a step that was given up."""
    for row in range(2):
        view.write_row(row, 1 + row)
    for abort in (False, True):
        assert model.engine.begin_step(plan(1, loads=((8, 0, 2),)), stream.id, graph=True)
        model.engine.enter_graph()
        if abort:
            model.engine.abort_step()
        else:
            model.launch()
            model.engine.end_step()
        stream.synchronize()
        for block in (8, 9):
            view.write_all(block, 99)
        model.launch()
        stream.synchronize()
        assert all(not view.holds(layer, 8 + i, 1 + i) for layer in LAYERS for i in (0, 1))


def test_promotions(model: GraphModel, stream: DriverStream, view: View) -> None:
    view.write_row(0, 5)
    view.write_row(1, 6)
    seen = Seen(view, b3=5, b8=6)
    stats = model.run(plan(1, promotions=((3, 0, 1),), loads=((8, 1, 1),)), attend=seen)
    stream.synchronize()
    seen.check()
    assert (stats.bytes_promoted, stats.bytes_loaded) == (6000, 12000)
    # Resident from now on.
    seen = Seen(view, b3=5)
    model.run(plan(2), attend=seen)
    stream.synchronize()
    seen.check()


def test_a_step_that_only_promotes_loads_no_ring_page(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    view.write_row(0, 5)
    model.run(plan(1, promotions=((3, 0, 1),)))
    stream.synchronize()
    assert all(view.holds(layer, 3, 5) for layer in LAYERS)


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"loads": ((8, 0, 1), (9, 2, 1), (10, 4, 1))}, True),
        ({"loads": ((8, 0, 1), (9, 2, 1), (10, 4, 1), (11, 6, 1))}, False),
        ({"loads": ((8, 0, 1),), "stores": ((1, 3, 1),)}, True),
        ({"promotions": ((5, 1, 1),), "stores": ((1, 3, 1),)}, False),
        ({"promotions": ((5, 1, 1), (6, 2, 1), (7, 3, 1))}, True),
        ({"promotions": ((5, 1, 1), (6, 2, 1)), "loads": ((8, 0, 2), (11, 3, 1))}, False),
    ],
)
def test_what_fits_a_graph(make_engine: MakeEngine, changes: dict[str, object], fits: bool) -> None:
    engine = make_engine()
    engine.use_graphs(IMAGE, 3)
    step = plan(1, **changes)  # type: ignore[arg-type]
    assert engine.begin_step(step, 0, graph=True) is fits
    if not fits:
        with pytest.raises(TransferError, match="does not fit"):
            engine.enter_graph()
    for layer in LAYERS:
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    assert engine.end_step().gates == 6


def test_nothing_fits_unless_asked_and_prepared(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert not engine.begin_step(plan(1), graph=True)
    engine.abort_step()
    engine.use_graphs(IMAGE, PIECES)
    assert not engine.begin_step(plan(2))
    engine.abort_step()
    assert engine.begin_step(plan(3), graph=True)


@pytest.mark.parametrize(
    ("word", "fits"),
    [("skip_gate", False), ("late_submit", False), ("poison", False), ("skip_loads", True)],
)
def test_debug_switches(make_engine: MakeEngine, word: str, fits: bool) -> None:
    engine = make_engine(debug=(word,))
    engine.use_graphs(IMAGE, PIECES)
    assert engine.begin_step(plan(1), graph=True) is fits


def test_skipped_loads_are_skipped_in_graphs_too(make_engine: MakeEngine, capture: Capture) -> None:
    engine = make_engine(debug=("skip_loads",))
    engine.use_graphs(IMAGE, PIECES)
    stream, view = DriverStream(engine), View(engine)
    model = capture(engine, stream)
    view.write_row(0, 5)
    stats = model.run(plan(1, loads=((8, 0, 1),)))
    stream.synchronize()
    assert not any(view.holds(layer, 8, 5) for layer in LAYERS)
    assert stats.bytes_loaded == 0


@pytest.mark.parametrize("stores", [(), ((1, 5, 1),)])
def test_a_step_that_fits_may_run_piecewise(
    engine: TransferEngine, stream: DriverStream, view: View, stores: tuple[tuple[int, int, int], ...]
) -> None:
    """Exactly as before: the same copies, only some of them at the first gate."""
    view.write_row(0, 7)
    view.write_row(1, 8)
    view.write_all(1, 9)
    found = []
    for step, graph in ((1, False), (2, True), (3, True)):
        seen = Seen(view, b8=7, b9=8)
        batches = load().calls("cuMemcpyBatchAsync")
        assert engine.begin_step(
            plan(step, loads=((8, 0, 2),), stores=stores), stream.id, graph=graph
        ) is graph
        at_once = load().calls("cuMemcpyBatchAsync") - batches
        assert at_once == (1 if graph else 2) + 6 * len(stores)
        for layer in LAYERS:
            engine.before_write(layer)
            engine.before_attention(layer)
            stream.launch(lambda layer=layer, seen=seen: seen(layer))
            engine.after_attention(layer)
        found.append(engine.end_step()._replace(step=0, load_seconds=0, store_seconds=0,
                                                bytes_finished=0, stall_step=0, stall_seconds=0))
        stream.synchronize()
        seen.check()
    assert found[0] == found[1] == found[2]
    engine.drain()
    assert all(view.row_holds(5, layer, 9) for layer in LAYERS) is bool(stores)


# Order. Rules 13 to 18 of csrc/DESIGN.md; every replay also passes the stand-in's race check.


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


def test_the_replay_waits_for_the_head(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
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
    assert model.engine.begin_step(plan(1, loads=((8, 0, 1),)), stream.id, graph=True)
    model.engine.drain()
    assert [view.holds(layer, 8, 3) for layer in (0, 1)] == [True, False]
    model.engine.enter_graph()
    model.launch()
    model.engine.end_step()
    stream.synchronize()


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
        deadline = time.monotonic() + 5
        while not view.holds(0, 8, 3) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert view.holds(0, 8, 3)
    model.engine.abort_step()


def test_a_new_compute_stream_comes_after_the_replay(
    capture: Capture, engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """Its tables too: they are emptied first."""
    model, other = capture(engine, stream), capture(engine, DriverStream(engine))
    view.write_row(0, 3)
    view.write_row(1, 4)
    first, second = Seen(view, b8=3), Seen(view, b8=4)

    def slow(layer: int) -> None:
        time.sleep(0.005)
        first(layer)

    model.run(plan(1, loads=((8, 0, 1),)), attend=slow)
    other.run(plan(2, loads=((8, 1, 1),)), attend=second)
    other.stream.synchronize()
    stream.synchronize()
    first.check()
    second.check()


def test_a_chunk_is_given_back_only_after_the_replay(
    make_engine: MakeEngine, capture: Capture, kernel: GatherKernel
) -> None:
    """Which reads its rows; the stand-in sees memory that goes too early."""
    engine = make_engine()
    engine.use_graphs(IMAGE, PIECES)
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


def test_steps_in_flight_do_not_block(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
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


# Aborts.


@pytest.mark.parametrize("launched", [True, False])
def test_promotions_of_an_aborted_step_are_made(
    model: GraphModel, stream: DriverStream, view: View, launched: bool, kernel: GatherKernel
) -> None:
    view.write_row(0, 5)
    kernel.wait(2)
    assert model.engine.begin_step(plan(1, promotions=((3, 0, 1),)), stream.id, graph=True)
    model.engine.enter_graph()
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
    engine.use_graphs(IMAGE, PIECES)
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


# Proof that the graph copied.


def test_counts_of_finished_copies_leave_the_graphs_out(
    model: GraphModel, stream: DriverStream
) -> None:
    model.run(plan(1, loads=((8, 0, 1),)))
    stream.synchronize()
    model.engine.drain()
    assert counters(model.engine, "load").bytes == 1000  # the head's


def end_by_step(model: GraphModel) -> None:
    model.engine.begin_step(plan(2), model.stream.id)


def end_by_graph_steps(model: GraphModel) -> None:
    for step in range(2, 7):
        model.run(plan(step))


def end_by_drain(model: GraphModel) -> None:
    model.engine.drain()


def end_by_abort(model: GraphModel) -> None:
    model.engine.abort_step()


@pytest.mark.parametrize("end", [end_by_step, end_by_graph_steps, end_by_drain, end_by_abort])
@pytest.mark.parametrize("lost", ["launch", "count"])
def test_a_replay_that_did_not_copy_all_layers_fails_the_engine(
    model: GraphModel, kernel: GatherKernel, end: Callable[[GraphModel], None], lost: str
) -> None:
    with latched(model.stream):
        assert model.engine.begin_step(plan(1), model.stream.id, graph=True)
        model.engine.enter_graph()
        if lost == "count":
            kernel.uncount()
            model.launch()
        model.engine.end_step()
    model.stream.synchronize()
    kernel.reset()
    with pytest.raises(GateError, match="the graph of step 1 copied 0 layers and not 6"):
        end(model)
    # It is said once.
    model.engine.abort_step()
    model.run(plan(9))
    model.engine.drain()


def test_the_step_itself_fails_where_its_count_is_there(model: GraphModel) -> None:
    """The stand-in's default stream is over when the call returns."""
    engine = model.engine
    assert engine.begin_step(plan(1), 0, graph=True)
    engine.enter_graph()
    with pytest.raises(GateError, match="the graph of step 1 copied 0 layers"):
        engine.end_step()


def test_a_graph_launched_twice_is_found(model: GraphModel) -> None:
    with latched(model.stream):
        assert model.engine.begin_step(plan(1), model.stream.id, graph=True)
        model.engine.enter_graph()
        model.launch()
        model.launch()
        model.engine.end_step()
    with pytest.raises(GateError, match="copied 12 layers"):
        model.engine.drain()


def test_close_tells_of_it_and_gives_everything_back(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.use_graphs(IMAGE, PIECES)
    stream = DriverStream(engine)
    with latched(stream):
        assert engine.begin_step(plan(1), stream.id, graph=True)
        engine.enter_graph()
        engine.end_step()
    with pytest.raises(GateError, match="step 1"):
        engine.close()
    assert load().live() == []


# Calls at the wrong time.


def test_calls_at_the_wrong_time(make_engine: MakeEngine) -> None:
    engine = make_engine()
    stream = DriverStream(engine)
    for call in (lambda: engine.begin_capture(stream.id), engine.end_capture, engine.enter_graph):
        with pytest.raises(TransferError, match="without"):
            call()
    engine.use_graphs(IMAGE, PIECES)
    with pytest.raises(TransferError, match="again"):
        engine.use_graphs(IMAGE, PIECES)
    with pytest.raises(TransferError, match="not capturing"):
        engine.begin_capture(stream.id)
    with pytest.raises(TransferError, match="without begin_capture"):
        engine.end_capture()
    assert engine.begin_step(plan(1), stream.id, graph=True)
    for call in (lambda: engine.begin_capture(stream.id), lambda: engine.use_graphs(IMAGE, 1)):
        with pytest.raises(TransferError, match="inside a step"):
            call()
    engine.before_write(0)
    engine.before_attention(0)
    with pytest.raises(TransferError, match="has begun to run otherwise"):
        engine.enter_graph()
    engine.abort_step()
    assert engine.begin_step(plan(2), stream.id, graph=True)
    engine.enter_graph()
    for gate in (engine.before_write, engine.before_attention, engine.after_attention):
        with pytest.raises(TransferError, match="step 2, which runs in a graph"):
            gate(0)
    with pytest.raises(TransferError, match="otherwise"):
        engine.enter_graph()
    engine.abort_step()


@pytest.mark.parametrize("pieces", [0, -1, 65537])
def test_tables_that_cannot_be(make_engine: MakeEngine, pieces: int) -> None:
    engine = make_engine()
    live = load().live()
    with pytest.raises(ConfigError, match="1 to 65536 pieces"):
        engine.use_graphs(IMAGE, pieces)
    for image, blocks in ((b"", 8), (IMAGE, 0), (IMAGE, 13)):
        with pytest.raises(ConfigError, match="1 to 12 blocks"):
            engine.use_graphs(image, 8, blocks)
    assert load().live() == live
    engine.use_graphs(IMAGE, 8, 12)


def test_the_host_driver_has_no_graphs() -> None:
    with TransferEngine(geometry()) as engine:
        with pytest.raises(UnsupportedError, match="no kernels"):
            engine.use_graphs(IMAGE, PIECES)
        assert not engine.begin_step(plan(1), graph=True)
        engine.abort_step()

"""Steps in CUDA graphs, over the stand-in: proof that they copied, and calls out of place."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError, GateError, TransferError, UnsupportedError
from tests.engine.driving import View, geometry, inject, latched, plan
from tests.engine.graphing import PIECES, GraphModel
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.standin import load
from tests.helpers.streams import DriverStream

MakeEngine = Callable[..., TransferEngine]
Capture = Callable[..., GraphModel]
pytestmark = pytest.mark.usefixtures("kernel")


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
        model.engine.graphs.enter()
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


def test_a_count_is_looked_at_before_its_buffer_comes_round(model: GraphModel) -> None:
    """Steps take all buffers."""
    engine = model.engine
    with latched(model.stream) as latch:
        for step in range(1, 5):
            assert engine.begin_step(plan(step), model.stream.id, graph=True)
            engine.graphs.enter()
            if step > 1:
                model.launch()
            engine.end_step()
        assert engine.begin_step(plan(5), model.stream.id, graph=True)
        threading.Timer(0.05, latch.open).start()
        with pytest.raises(GateError, match="the graph of step 1 copied 0 layers"):
            engine.graphs.enter()
    engine.abort_step()


def test_the_step_itself_fails_where_its_count_is_there(model: GraphModel) -> None:
    """The stand-in's default stream is over when the call returns."""
    engine = model.engine
    assert engine.begin_step(plan(1), 0, graph=True)
    engine.graphs.enter()
    with pytest.raises(GateError, match="the graph of step 1 copied 0 layers"):
        engine.end_step()


def test_a_graph_launched_twice_is_found(model: GraphModel) -> None:
    with latched(model.stream):
        assert model.engine.begin_step(plan(1), model.stream.id, graph=True)
        model.engine.graphs.enter()
        model.launch()
        model.launch()
        model.engine.end_step()
    with pytest.raises(GateError, match="copied 12 layers"):
        model.engine.drain()


def lose(model: GraphModel, steps: range) -> None:
    """Steps whose graph is not launched."""
    with latched(model.stream):
        for step in steps:
            assert model.engine.begin_step(plan(step), model.stream.id, graph=True)
            model.engine.graphs.enter()
            model.engine.end_step()
    model.stream.synchronize()


def test_the_first_of_several_is_told_first(model: GraphModel) -> None:
    """Whatever buffers they had."""
    for step in range(1, 4):
        model.run(plan(step))
    model.engine.drain()
    lose(model, range(4, 6))
    for step in (4, 5):
        with pytest.raises(GateError, match=f"the graph of step {step} copied 0"):
            model.engine.drain()
    model.engine.drain()


def test_a_count_that_is_late_is_waited_for(model: GraphModel) -> None:
    inject(model.engine, "late", direction="store", milliseconds=30)
    model.run(plan(1))
    model.engine.drain()


def test_an_abort_that_tells_of_it_has_emptied_the_tables(model: GraphModel) -> None:
    engine, view = model.engine, View(model.engine)
    with latched(model.stream) as latch:
        assert engine.begin_step(plan(1), model.stream.id, graph=True)
        engine.graphs.enter()
        engine.end_step()
        assert engine.begin_step(plan(2, loads=((8, 0, 1),)), model.stream.id, graph=True)
        engine.graphs.enter()
        latch.open()
        with pytest.raises(GateError, match="step 1"):
            engine.abort_step()
    view.write_all(8, 99)
    model.launch()
    model.stream.synchronize()
    assert all(view.holds(layer, 8, 99) for layer in (4, 5))


def test_tables_that_are_empty_are_not_emptied_again(model: GraphModel) -> None:
    """By an abort of no step, twice, on a stream that is not the compute's."""
    model.run(plan(1, loads=((8, 0, 1),)))
    model.stream.synchronize()
    for emptied in (0, 1, 0):
        if emptied:
            assert model.engine.begin_step(plan(2), model.stream.id, graph=True)
            model.engine.graphs.enter()
        before = load().calls("cuMemsetD8Async")
        model.engine.abort_step()
        assert load().calls("cuMemsetD8Async") - before == emptied


def test_counts_that_are_known_are_not_asked_for(model: GraphModel) -> None:
    model.run(plan(1))
    model.engine.drain()
    before = load().calls("cuEventQuery")
    model.engine.begin_step(plan(2), model.stream.id)
    assert load().calls("cuEventQuery") == before
    model.engine.abort_step()


def test_close_tells_of_it_and_gives_everything_back(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.graphs.prepare(IMAGE, PIECES)
    stream = DriverStream(engine)
    with latched(stream):
        assert engine.begin_step(plan(1), stream.id, graph=True)
        engine.graphs.enter()
        engine.end_step()
    with pytest.raises(GateError, match="step 1"):
        engine.close()
    assert load().live() == []


# Calls at the wrong time.


def test_calls_at_the_wrong_time(make_engine: MakeEngine) -> None:
    engine = make_engine()
    stream = DriverStream(engine)
    for call in (
        lambda: engine.graphs.begin_capture(stream.id),
        engine.graphs.end_capture,
        engine.graphs.enter,
    ):
        with pytest.raises(TransferError, match="without"):
            call()
    engine.graphs.prepare(IMAGE, PIECES)
    with pytest.raises(TransferError, match="again"):
        engine.graphs.prepare(IMAGE, PIECES)
    with pytest.raises(TransferError, match="not capturing"):
        engine.graphs.begin_capture(stream.id)
    with pytest.raises(TransferError, match="without begin_capture"):
        engine.graphs.end_capture()
    assert engine.begin_step(plan(1), stream.id, graph=True)
    for call in (
        lambda: engine.graphs.begin_capture(stream.id),
        lambda: engine.graphs.prepare(IMAGE, 1),
    ):
        with pytest.raises(TransferError, match="inside a step"):
            call()
    engine.before_write(0)
    engine.before_attention(0)
    with pytest.raises(TransferError, match="has begun to run otherwise"):
        engine.graphs.enter()
    engine.abort_step()
    assert engine.begin_step(plan(2), stream.id, graph=True)
    engine.graphs.enter()
    for gate in (engine.before_write, engine.before_attention, engine.after_attention):
        with pytest.raises(TransferError, match="step 2, which runs in a graph"):
            gate(0)
    with pytest.raises(TransferError, match="otherwise"):
        engine.graphs.enter()
    engine.abort_step()


@pytest.mark.parametrize("pieces", [0, -1, 65537])
def test_tables_that_cannot_be(make_engine: MakeEngine, pieces: int) -> None:
    engine = make_engine()
    live = load().live()
    with pytest.raises(ConfigError, match="1 to 65536 pieces"):
        engine.graphs.prepare(IMAGE, pieces)
    for image, blocks in ((b"", 8), (IMAGE, 0), (IMAGE, 13)):
        with pytest.raises(ConfigError, match="1 to 12 blocks"):
            engine.graphs.prepare(image, 8, blocks)
    assert load().live() == live
    engine.graphs.prepare(IMAGE, 8, 12)


def test_the_host_driver_has_no_graphs() -> None:
    with TransferEngine(geometry()) as engine:
        with pytest.raises(UnsupportedError, match="no kernels"):
            engine.graphs.prepare(IMAGE, PIECES)
        assert not engine.begin_step(plan(1), graph=True)
        engine.abort_step()

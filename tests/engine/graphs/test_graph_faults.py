"""Captures that miss a gate, and calls of steps in graphs that fail, over the stand-in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import GateError, TransferError
from tests.engine.driving import View, plan
from tests.engine.graphing import GLOBAL, GraphModel
from tests.helpers.cuda_calls import Cuda
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.standin import Standin, load
from tests.helpers.streams import DriverStream

MakeEngine = Callable[..., TransferEngine]
pytestmark = pytest.mark.usefixtures("kernel")
LAYERS = range(6)
OUT_OF_MEMORY, UNJOINED = 2, 904


@pytest.fixture
def standin(driver: str) -> Iterator[Standin]:
    """The stand-in, whose faults a test may set."""
    assert driver == "cuda"
    yield load()
    load().clear()


def goes_on(engine: TransferEngine, stream: DriverStream, number: int = 50) -> None:
    """A new graph can be captured and loads the right bytes."""
    view, wrong = View(engine), []
    view.write_row(0, number)
    model = GraphModel(engine, stream)  # Ended here, so that what is live is as before.

    def attend(layer: int) -> None:
        if not view.holds(layer, 8, number):
            wrong.append(layer)

    model.run(plan(number, loads=((8, 0, 1),)), attend=attend)
    model.close()
    engine.drain()
    assert wrong == []


class Partial:
    """A capture whose layers pass some gates only."""

    def __init__(self, engine: TransferEngine, stream: DriverStream) -> None:
        self.engine, self.stream, self.cuda = engine, stream, Cuda(load())

    def run(self, gates: list[tuple[str, int]]) -> int:
        """The code of the capture's end. Raises what the engine's end of it raises."""
        self.cuda.do("cuStreamBeginCapture", self.stream.id, GLOBAL)
        graph = ctypes.c_uint64()
        try:
            self.engine.graphs.begin_capture(self.stream.id)
            for name, layer in gates:
                getattr(self.engine, name)(layer)
            self.engine.graphs.end_capture()
        finally:
            self.code = self.cuda.result("cuStreamEndCapture", self.stream.id, ctypes.byref(graph))
            if self.code == 0:
                self.cuda.do("cuGraphDestroy", graph.value)
        return self.code


ALL = [
    (name, layer)
    for layer in LAYERS
    for name in ("before_write", "before_attention", "after_attention")
]


READS = [gate for gate in ALL if gate[0] != "before_write"]


def without(*gates: tuple[str, int]) -> list[tuple[str, int]]:
    return [gate for gate in ALL if gate not in gates]


@pytest.mark.parametrize(
    ("gates", "text"),
    [
        ([], r"0 gates of 6; without their gate: layers 0, 1, 2, 3, 4, 5"),
        (without(("before_attention", 2)), r"5 gates of 6; without their gate: layers 2"),
        (without(("after_attention", 1)), r"6 gates of 6; without their gate: layers 1"),
        (without(("before_attention", 5), ("after_attention", 5)), "without their gate: layers 5"),
        ([*ALL, ("before_attention", 5)], "more than once: layers 5"),
        ([*ALL, ("after_attention", 4)], "more than once: layers 4"),
        ([*ALL[:3], *ALL[6:9], *ALL[3:6], *ALL[9:]], "out of order: layers 0, 2, 1"),
        (ALL[:7], "without their gate"),
        ([("before_write", 0)], "without their gate"),
        (READS, "6 gates of 6; without the gate of their KV write: layers 0, 1, 2, 3, 4, 5"),
        (
            without(("before_write", 5)),
            "6 gates of 6; without the gate of their KV write: layers 5",
        ),
        ([*ALL[1:3], ALL[0], *ALL[3:]], "KV written after their attention: layers 0"),
        ([*ALL[:3], *ALL[:1], *ALL[3:]], "KV written more than once: layers 0"),
        (
            [*ALL[3:4], *ALL[:3], *ALL[4:]],
            "6 gates of 6; with KV written out of order: layers 1, 0, 2, 3, 4, 5",
        ),
    ],
)
def test_a_capture_that_misses_a_gate_is_refused(
    engine: TransferEngine, stream: DriverStream, gates: list[tuple[str, int]], text: str
) -> None:
    """By the engine, not by CUDA: what was forked is joined all the same."""
    goes_on(engine, stream, 40)
    partial = Partial(engine, stream)
    with pytest.raises(GateError, match=f"the capture of a graph passed .*{text}"):
        partial.run(gates)
    assert partial.code == 0
    with pytest.raises(TransferError, match="without begin_capture"):
        engine.graphs.end_capture()
    goes_on(engine, stream)


def test_a_capture_knows_nothing_of_the_one_before(
    engine: TransferEngine, stream: DriverStream
) -> None:
    """It forks nothing at the layer that the other had come to."""
    for gates in (ALL[:6], [("after_attention", 2)]):
        partial = Partial(engine, stream)
        with pytest.raises(GateError):
            partial.run(gates)
        assert partial.code == 0
    goes_on(engine, stream)


def test_no_layer_outside_the_model(engine: TransferEngine, stream: DriverStream) -> None:
    with pytest.raises(GateError, match="no layer 6"):
        Partial(engine, stream).run([("before_write", 6)])
    with pytest.raises(GateError):
        engine.graphs.end_capture()


def test_no_step_inside_a_capture(engine: TransferEngine, stream: DriverStream) -> None:
    cuda, graph = Cuda(load()), ctypes.c_uint64()
    cuda.do("cuStreamBeginCapture", stream.id, GLOBAL)
    engine.graphs.begin_capture(stream.id)
    with pytest.raises(TransferError, match="inside a capture"):
        engine.graphs.begin_capture(stream.id)
    for call in (engine.begin_step, engine.run_idle):
        with pytest.raises(TransferError, match="inside a capture"):
            call(plan(1), stream.id)
    with pytest.raises(GateError):
        engine.graphs.end_capture()
    cuda.do("cuStreamEndCapture", stream.id, ctypes.byref(graph))
    cuda.do("cuGraphDestroy", graph.value)
    goes_on(engine, stream)


START = (
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemsetD8Async",
    "cuMemHostRegister",
    "cuStreamCreateWithPriority",
    "cuEventCreate",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuLaunchKernel",
)


@pytest.mark.parametrize("function", START)
def test_each_call_of_the_preparation_that_fails_leaves_nothing(
    make_engine: MakeEngine, standin: Standin, function: str
) -> None:
    before = standin.calls(function)
    with TransferEngine(make_engine().geometry, driver="cuda") as other:
        before = standin.calls(function)
        other.graphs.prepare(IMAGE, 4)
        calls = standin.calls(function) - before
    assert calls > 0
    engine = make_engine()
    stream, live = DriverStream(engine), standin.live()
    live = standin.live()
    for nth in range(1, calls + 1):
        standin.fail(function, nth, error=OUT_OF_MEMORY)
        with pytest.raises(TransferError, match=f"{function}.*CUDA_ERROR_OUT_OF_MEMORY"):
            engine.graphs.prepare(IMAGE, 4)
        assert standin.live() == live
    assert not engine.begin_step(plan(1), graph=True)
    engine.abort_step()
    engine.graphs.prepare(IMAGE, 4)
    goes_on(engine, stream)


def test_a_kernel_that_does_not_count_is_refused(
    make_engine: MakeEngine, kernel: GatherKernel
) -> None:
    engine = make_engine()
    kernel.uncount()
    with pytest.raises(TransferError, match="does not count"):
        engine.graphs.prepare(IMAGE, 4)


@pytest.mark.parametrize("function", ["cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel"])
@pytest.mark.parametrize("nth", [1, 2, 4, 6])
def test_a_capture_in_which_a_call_fails(
    engine: TransferEngine, stream: DriverStream, standin: Standin, function: str, nth: int
) -> None:
    """The gate says so; the engine goes on once its capture mode is left."""
    standin.fail(function, nth, error=OUT_OF_MEMORY)
    with pytest.raises(TransferError, match=f"{function}.*CUDA_ERROR_OUT_OF_MEMORY"):
        Partial(engine, stream).run(ALL)
    with pytest.raises(GateError):
        engine.graphs.end_capture()
    engine.begin_step(plan(3), stream.id)
    engine.abort_step()  # With the mark of the failure on the stream.
    goes_on(engine, stream)


@pytest.mark.parametrize("function", ["cuStreamIsCapturing"])
def test_a_stream_that_cannot_be_asked(
    engine: TransferEngine, stream: DriverStream, standin: Standin, function: str
) -> None:
    standin.fail(function, error=OUT_OF_MEMORY)
    with pytest.raises(TransferError, match=function):
        Partial(engine, stream).run(ALL)
    goes_on(engine, stream)


CALLS = ("cuMemcpy2DAsync", "cuEventRecord", "cuStreamWaitEvent", "cuMemsetD8Async")


@pytest.mark.parametrize("function", [*CALLS, "cuMemcpyBatchAsync", "cuEventSynchronize"])
def test_each_call_of_a_step_that_fails_ends_it(
    engine: TransferEngine,
    stream: DriverStream,
    standin: Standin,
    capture: Callable[..., GraphModel],
    function: str,
) -> None:
    """With an error that names it; after an abort all is as before, and the tables are empty."""
    model, view = capture(engine, stream), View(engine)
    model.run(plan(1, stores=((1, 0, 1),), loads=((8, 0, 1),)))
    before = standin.calls(function)
    model.run(plan(2, stores=((1, 0, 1),), loads=((9, 0, 1),)))
    calls = standin.calls(function) - before
    assert calls > 0
    for nth in range(1, calls + 1):
        number = 10 * nth
        standin.fail(function, nth, error=OUT_OF_MEMORY)
        with pytest.raises(TransferError, match=f"{function}.*CUDA_ERROR_OUT_OF_MEMORY"):
            model.run(plan(number, stores=((1, 0, 1),), loads=((8 + nth % 2, 0, 1),)))
        engine.abort_step()
        model.steps.clear()
        for block in (8, 9):
            view.write_all(block, 99)
        model.launch()
        stream.synchronize()
        assert all(view.holds(layer, 8, 99) for layer in (4, 5))
        seen = []
        view.write_row(0, number)
        model.run(
            plan(number + 5, loads=((8, 0, 1),)),
            attend=lambda layer, number=number, seen=seen: seen.append(
                view.holds(layer, 8, number)
            ),
        )
        stream.synchronize()
        assert seen == [True] * 6


def test_tables_that_cannot_be_emptied_are_an_error(
    engine: TransferEngine, stream: DriverStream, standin: Standin
) -> None:
    """Not once more by the abort: a replay without a plan would load."""
    assert engine.begin_step(plan(1, loads=((8, 0, 1),)), stream.id, graph=True)
    engine.graphs.enter()
    standin.fail("cuMemsetD8Async", error=OUT_OF_MEMORY)
    with pytest.raises(TransferError, match="cuMemsetD8Async"):
        engine.abort_step()
    engine.abort_step()
    goes_on(engine, stream)


def test_a_graph_may_outlive_the_engine(
    model: GraphModel, engine: TransferEngine, stream: DriverStream
) -> None:
    """Its kernel's code is still there: vLLM lets its graphs go after the worker's memory."""
    cuda = model.cuda
    context = cuda.make("cuDevicePrimaryCtxRetain", 0)  # As torch holds it.
    model.run(plan(1, loads=((8, 0, 1),)))
    stream.synchronize()
    unloaded = load().calls("cuModuleUnload")
    engine.close()
    assert context
    assert load().calls("cuModuleUnload") == unloaded
    cuda.do("cuGraphExecDestroy", model.executable)
    model.executable = 0
    assert load().violations() == []
    cuda.do("cuDevicePrimaryCtxRelease", 0)
    cuda.do("cuCtxSetCurrent", 0)  # It was the last to hold it.

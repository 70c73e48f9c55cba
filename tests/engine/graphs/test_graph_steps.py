"""Steps in CUDA graphs, over the stand-in: what a replay copies, and what it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import TransferError
from tests.engine.driving import View, plan, run_step
from tests.engine.graphing import LAYERS, PIECES, GraphModel, Seen
from tests.helpers.gather_kernel import IMAGE
from tests.helpers.standin import load
from tests.helpers.streams import DriverStream

MakeEngine = Callable[..., TransferEngine]
Capture = Callable[..., GraphModel]
pytestmark = pytest.mark.usefixtures("kernel")


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


def test_the_loads_of_the_step_before(model: GraphModel, stream: DriverStream, view: View) -> None:
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


def test_tables_that_may_be_half_written_are_written_again(
    model: GraphModel, stream: DriverStream
) -> None:
    """Though the plan is that of what they held before."""
    model.run(plan(1, loads=((8, 0, 1),)))
    load().fail("cuMemcpy2DAsync", error=2)
    with pytest.raises(TransferError, match="cuMemcpy2DAsync"):
        model.run(plan(2, loads=((9, 0, 1),)))
    model.engine.abort_step()
    copies = load().calls("cuMemcpy2DAsync")
    model.run(plan(3, loads=((8, 0, 1),)))
    stream.synchronize()
    # Tables, numbers, and the count back.
    assert load().calls("cuMemcpy2DAsync") - copies == 3


@pytest.mark.parametrize("head_first", [True, False])
def test_a_step_that_copies_nothing_waits_for_nothing(
    model: GraphModel, stream: DriverStream, head_first: bool
) -> None:
    """But the copy streams for its replay; also after stores that were waited for or aborted."""
    model.engine.submit_head_first(head_first)
    # Each store waits for two records; all but the head's are submitted where the graph is entered.
    by_stores = 2 * (len(LAYERS) - 1) if head_first else 0
    assert model.engine.begin_step(plan(0, stores=((1, 0, 1),)), stream.id, graph=True)
    model.engine.abort_step()
    for step, plans, waits in (
        (1, {}, 0),
        (2, {"stores": ((1, 0, 1),)}, 1 + by_stores),
        (3, {}, 0),
    ):
        before = load().calls("cuStreamWaitEvent")
        assert model.engine.begin_step(plan(step, **plans), stream.id, graph=True)
        entered = load().calls("cuStreamWaitEvent")
        model.engine.graphs.enter()
        assert load().calls("cuStreamWaitEvent") - entered == waits
        model.launch()
        model.engine.end_step()
        if step == 3:
            assert load().calls("cuStreamWaitEvent") - before == 2
    stream.synchronize()


def test_a_replay_without_a_plan_loads_nothing(
    model: GraphModel, stream: DriverStream, view: View
) -> None:
    """Nor does one after a step that was given up."""
    for row in range(2):
        view.write_row(row, 1 + row)
    for abort in (False, True):
        assert model.engine.begin_step(plan(1, loads=((8, 0, 2),)), stream.id, graph=True)
        model.engine.graphs.enter()
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
    engine.graphs.prepare(IMAGE, 3)
    step = plan(1, **changes)  # type: ignore[arg-type]
    assert engine.begin_step(step, 0, graph=True) is fits
    if not fits:
        with pytest.raises(TransferError, match="does not fit"):
            engine.graphs.enter()
    for layer in LAYERS:
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    assert engine.end_step().gates == 6


def test_nothing_fits_unless_asked_and_prepared(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert not engine.begin_step(plan(1), graph=True)
    engine.abort_step()
    engine.graphs.prepare(IMAGE, PIECES)
    assert not engine.begin_step(plan(2))
    engine.abort_step()
    assert engine.begin_step(plan(3), graph=True)


@pytest.mark.parametrize(
    ("word", "fits"),
    [("skip_gate", False), ("late_submit", False), ("poison", False), ("skip_loads", True)],
)
def test_debug_switches(make_engine: MakeEngine, word: str, fits: bool) -> None:
    engine = make_engine(debug=(word,))
    engine.graphs.prepare(IMAGE, PIECES)
    assert engine.begin_step(plan(1), graph=True) is fits


def test_skipped_loads_are_skipped_in_graphs_too(make_engine: MakeEngine, capture: Capture) -> None:
    engine = make_engine(debug=("skip_loads",))
    engine.graphs.prepare(IMAGE, PIECES)
    stream, view = DriverStream(engine), View(engine)
    model = capture(engine, stream)
    view.write_row(0, 5)
    stats = model.run(plan(1, loads=((8, 0, 1),)))
    stream.synchronize()
    assert not any(view.holds(layer, 8, 5) for layer in LAYERS)
    assert stats.bytes_loaded == 0


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("stores", [(), ((1, 5, 1),)])
def test_a_step_that_fits_may_run_piecewise(
    engine: TransferEngine,
    stream: DriverStream,
    view: View,
    stores: tuple[tuple[int, int, int], ...],
    head_first: bool,
) -> None:
    """Exactly as before: the same copies, only some of them at the first gate."""
    engine.submit_head_first(head_first)
    view.write_row(0, 7)
    view.write_row(1, 8)
    view.write_all(1, 9)
    found = []
    for step, graph in ((1, False), (2, True), (3, True)):
        seen = Seen(view, b8=7, b9=8)
        batches = load().calls("cuMemcpyBatchAsync")
        assert (
            engine.begin_step(plan(step, loads=((8, 0, 2),), stores=stores), stream.id, graph=graph)
            is graph
        )
        at_once = load().calls("cuMemcpyBatchAsync") - batches
        if head_first:
            assert at_once == 1 + len(stores)
        else:
            assert at_once == (1 if graph else 2) + 6 * len(stores)
        for layer in LAYERS:
            engine.before_write(layer)  # No gate where no write has to wait.
            engine.before_attention(layer)
            if layer == 0:  # The ring is full from the first gate on.
                begun = load().calls("cuMemcpyBatchAsync") - batches
                assert begun == 2 + 6 * len(stores)
            stream.launch(lambda layer=layer, seen=seen: seen(layer))
            engine.after_attention(layer)
        found.append(
            engine.end_step()._replace(
                step=0,
                load_seconds=0,
                store_seconds=0,
                bytes_finished=0,
                stall_step=0,
                stall_seconds=0,
            )
        )
        stream.synchronize()
        seen.check()
    assert found[0] == found[1] == found[2]
    engine.drain()
    assert all(view.row_holds(5, layer, 9) for layer in LAYERS) is bool(stores)

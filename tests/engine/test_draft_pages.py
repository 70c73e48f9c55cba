"""Rule 28: pages of draft layers, which run behind the gates and have pages for pooled blocks."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import CopyError
from pie_vllm.plan import StepPlan
from tests.engine.driving import View, host_only, inject, latched, plan, run_step
from tests.engine.graphing import PIECES, GraphModel
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.streams import DriverStream

OLD, NEW, OTHER = 11, 22, 33
DRAFTS = (6, 7)
"""Regions of the two draft layers, behind six with a pool."""

POOLED, RESIDENT = 8, 3
DELAY = 0.03
MakeEngine = Callable[..., TransferEngine]


@pytest.fixture
def engine(make_engine: MakeEngine) -> TransferEngine:
    """Six layers with a pool, two draft layers, and a region more."""
    return make_engine(draft_layers=2, extra_regions=1)


def write(view: View, block: int, tag: int) -> None:
    """The block's pages of all layers."""
    view.write_all(block, tag)
    for region in DRAFTS:
        view.write(region, block, tag)


def write_drafts(view: View, block: int, tag: int) -> None:
    for region in DRAFTS:
        view.write(region, block, tag)


def drafts_hold(view: View, block: int, tag: int) -> bool:
    return all(view.holds(region, block, tag) for region in DRAFTS)


def row_holds(view: View, row: int, tag: int) -> bool:
    return all(view.row_holds(row, layer, tag) for layer in range(8))


def seen_by_drafts(
    engine: TransferEngine, stream: DriverStream, view: View, step: StepPlan, block: int, tag: int
) -> bool:
    """Whether drafts that run behind a step's last gate find the tag."""
    seen: list[bool] = []
    run_step(engine, step, stream=stream)
    stream.launch(lambda: seen.append(drafts_hold(view, block, tag)))
    stream.synchronize()
    return seen == [True]


def test_draft_pages_of_pooled_blocks_are_no_ring(engine: TransferEngine, view: View) -> None:
    """They lie beside the ring, and each other; a load into it leaves them alone."""
    write(view, POOLED, OLD)
    for layer in range(engine.geometry.num_layers):
        view.write(layer, POOLED, NEW)
    assert drafts_hold(view, POOLED, OLD)
    assert engine.device_bytes == engine.geometry.device_bytes


@pytest.mark.parametrize("fault", ["none", "late"])
@pytest.mark.parametrize("inline", [True, False])
def test_a_demoted_block_keeps_its_drafts(
    engine: TransferEngine, stream: DriverStream, view: View, fault: str, inline: bool
) -> None:
    """The step that demotes it stores its page, and fills that of its pooled id."""
    write(view, RESIDENT, OLD)
    inject(engine, fault, milliseconds=5)
    step = plan(1, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),))
    if inline:
        run_step(engine, step)
        assert drafts_hold(view, POOLED, OLD)
    else:
        assert seen_by_drafts(engine, stream, view, step, POOLED, OLD)
    stream.synchronize()
    engine.drain()
    assert row_holds(view, 0, OLD)


def test_a_page_is_filled_once(engine: TransferEngine, stream: DriverStream, view: View) -> None:
    """While the row is as it was, whichever steps read the block in between."""
    page = engine.geometry.page_bytes
    write(view, RESIDENT, OLD)
    steps = (
        plan(1, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),)),
        plan(2, loads=None),
        plan(3, loads=()),
        plan(4, loads=((POOLED, 0, 1),)),
    )
    loaded = [run_step(engine, step, stream=stream).bytes_loaded for step in steps]
    assert loaded == [8 * page, 6 * page, 0, 6 * page]
    stream.synchronize()
    assert drafts_hold(view, POOLED, OLD)


@pytest.mark.parametrize("again", [True, False])
def test_a_page_is_filled_again_once_its_row_has_changed(
    engine: TransferEngine, stream: DriverStream, view: View, again: bool
) -> None:
    """Id and row may be those of the block before, so that the loads are the same runs."""
    write(view, RESIDENT, OLD)
    store, load = (RESIDENT, 0, 1), (POOLED, 0, 1)
    run_step(engine, plan(1, stores=(store,), loads=(load,)), stream=stream)
    stream.synchronize()
    write(view, RESIDENT, NEW)
    step = plan(2, stores=(store,), loads=None if again else (load,))
    assert seen_by_drafts(engine, stream, view, step, POOLED, NEW)


def test_pages_follow_rows_that_change_hands(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """A parked row gets another id; then it is stored to, and the first id has it again."""
    write(view, 2, OLD)
    write(view, RESIDENT, OTHER)
    steps = (
        (plan(1, stores=((2, 0, 1),), loads=((POOLED, 0, 1),)), POOLED, OLD),
        (plan(2, loads=((POOLED + 1, 0, 1),)), POOLED + 1, OLD),
        (plan(3, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),)), POOLED, OTHER),
        (plan(4, stores=((2, 1, 1),), loads=((POOLED, 1, 1),)), POOLED, OLD),
    )
    for step, block, tag in steps:
        assert seen_by_drafts(engine, stream, view, step, block, tag), step.step


def test_a_store_to_a_row_that_a_page_had_before_fills_nothing(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """The page has the content of another row by now."""
    write(view, 2, OLD)
    store, load = ((2, 0, 1), (2, 1, 1)), (POOLED, 1, 1)
    run_step(engine, plan(1, stores=store, loads=((POOLED, 0, 1),)), stream=stream)
    run_step(engine, plan(2, loads=(load,)), stream=stream)
    stats = run_step(engine, plan(3, stores=((2, 0, 1),), loads=(load,)), stream=stream)
    assert stats.bytes_loaded == 6 * engine.geometry.page_bytes
    stream.synchronize()
    assert drafts_hold(view, POOLED, OLD)


@pytest.mark.parametrize("idle", [True, False])
def test_a_promoted_block_brings_its_drafts(
    engine: TransferEngine, stream: DriverStream, view: View, idle: bool
) -> None:
    write(view, RESIDENT, OLD)
    run_step(engine, plan(1, stores=((RESIDENT, 0, 1),)), stream=stream)
    inject(engine, "late", direction="load", milliseconds=10)
    if idle:
        engine.run_idle(plan(2, promotions=((5, 0, 1),), forward=False), stream.id)
        stream.launch(lambda: write_drafts(view, 6, NEW))
        seen: list[bool] = []
        stream.launch(lambda: seen.append(drafts_hold(view, 5, OLD)))
        stream.synchronize()
        assert seen == [True]
    else:
        step = plan(2, promotions=((5, 0, 1),))
        assert seen_by_drafts(engine, stream, view, step, 5, OLD)


def test_stores_wait_for_drafts_of_the_step_before(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """They run behind its last gate, in their own time."""
    write(view, RESIDENT, OLD)
    run_step(engine, plan(1), stream=stream)
    stream.launch(lambda: (time.sleep(DELAY), write_drafts(view, RESIDENT, NEW)))
    run_step(engine, plan(2, stores=((RESIDENT, 0, 1),)), stream=stream)
    stream.synchronize()
    engine.drain()
    assert all(view.row_holds(0, region, NEW) for region in DRAFTS)


def test_loads_wait_for_drafts_of_the_step_before(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """A page changes hands while these still read it."""
    for row, tag in ((0, OLD), (1, NEW)):
        write(view, RESIDENT, tag)
        engine.run_idle(plan(row + 1, stores=((RESIDENT, row, 1),), forward=False), stream.id)
        stream.synchronize()
    seen: list[bool] = []
    run_step(engine, plan(3, loads=((POOLED, 0, 1),)), stream=stream)
    stream.launch(lambda: (time.sleep(DELAY), seen.append(drafts_hold(view, POOLED, OLD))))
    run_step(engine, plan(4, loads=((POOLED, 1, 1),)), stream=stream)
    stream.launch(lambda: seen.append(drafts_hold(view, POOLED, NEW)))
    stream.synchronize()
    assert seen == [True, True]


@pytest.mark.parametrize("idle", [True, False])
def test_drafts_wait_for_stores_of_their_pages(
    engine: TransferEngine, stream: DriverStream, view: View, idle: bool
) -> None:
    """The step that stores a page may write it: the id went to another request."""
    write(view, RESIDENT, OLD)
    inject(engine, "late", direction="store", milliseconds=10)
    step = plan(1, stores=((RESIDENT, 0, 1),), forward=not idle)
    if idle:
        engine.run_idle(step, stream.id)
    else:
        run_step(engine, step, stream=stream)
    stream.launch(lambda: write_drafts(view, RESIDENT, NEW))
    stream.synchronize()
    engine.drain()
    assert row_holds(view, 0, OLD)


def test_stores_first_holds_for_draft_pages(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """What is zeroed ahead of the first gate is a page of all regions."""
    write(view, RESIDENT, OLD)
    inject(engine, "late", direction="store", milliseconds=10)
    engine.begin_step(plan(1, stores=((RESIDENT, 0, 1),), stores_first=True), stream.id)
    stream.launch(lambda: write_drafts(view, RESIDENT, NEW))
    stream.synchronize()
    engine.abort_step()
    assert row_holds(view, 0, OLD)


def test_copies_of_draft_pages_keep_their_order(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """A row is stored to after the load from it, and a page is filled after its store."""
    write(view, RESIDENT, OLD)
    write(view, 4, NEW)
    run_step(engine, plan(1, stores=((RESIDENT, 0, 1),)), stream=stream)
    stream.synchronize()
    inject(engine, "late", milliseconds=8)
    run_step(engine, plan(2, promotions=((5, 0, 1),)), stream=stream)
    run_step(engine, plan(3, stores=((4, 0, 1), (5, 1, 1))), stream=stream)
    run_step(engine, plan(4, promotions=((4, 1, 1),)), stream=stream)
    stream.synchronize()
    engine.drain()
    assert row_holds(view, 0, NEW)
    assert row_holds(view, 1, OLD)
    assert drafts_hold(view, 5, OLD)
    assert drafts_hold(view, 4, OLD)


def test_abort_stores_and_promotes_draft_pages_and_fills_all_again(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    write(view, RESIDENT, OLD)
    run_step(engine, plan(1, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),)), stream=stream)
    stream.synchronize()
    write(view, 4, NEW)
    step = plan(2, stores=((4, 1, 1),), promotions=((5, 0, 1),), loads=((POOLED + 1, 1, 1),))
    engine.begin_step(step, stream.id)
    engine.abort_step()
    assert row_holds(view, 1, NEW)
    assert drafts_hold(view, 5, OLD)
    write_drafts(view, POOLED, OTHER)
    write_drafts(view, POOLED + 1, OTHER)
    step = plan(3, loads=((POOLED, 0, 2),))
    assert seen_by_drafts(engine, stream, view, step, POOLED, OLD)
    assert drafts_hold(view, POOLED + 1, NEW)


@host_only
@pytest.mark.parametrize(
    ("direction", "text"), [("store", "device to host"), ("load", "host to device")]
)
def test_a_copy_of_a_draft_page_that_fails_is_seen_at_the_last_gate(
    engine: TransferEngine, view: View, direction: str, text: str
) -> None:
    write(view, RESIDENT, OLD)
    inject(engine, "fail", direction=direction, nth=7)  # Behind those of six layers.
    step = plan(1, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),))
    engine.begin_step(step)
    for layer in range(6):
        engine.before_write(layer)
        engine.before_attention(layer)
        if layer < 5:
            engine.after_attention(layer)
    with pytest.raises(CopyError, match=f"a copy {text} of 1000 bytes failed"):
        engine.after_attention(5)
    engine.abort_step()
    run_step(engine, plan(2, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),)))
    assert drafts_hold(view, POOLED, OLD)


@pytest.mark.parametrize("debug", [(), ("skip_drafts",)])
def test_pages_that_are_not_filled_are_seen(
    make_engine: MakeEngine, debug: tuple[str, ...]
) -> None:
    """The negative control of tests with real engines: the ring is right, draft pages are not."""
    engine = make_engine(draft_layers=2, debug=debug)
    view = View(engine)
    write(view, RESIDENT, OLD)
    seen: list[bool] = []
    step = plan(1, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),))
    run_step(engine, step, attend=lambda layer: seen.append(view.holds(layer, POOLED, OLD)))
    assert seen == [True] * 6
    assert drafts_hold(view, POOLED, OLD) is (debug == ())


def test_zeroing_the_ring_zeroes_draft_pages(engine: TransferEngine, view: View) -> None:
    """Warm-up writes there, too; what is pooled after it is filled anew."""
    write(view, RESIDENT, OLD)
    step = plan(1, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),))
    run_step(engine, step)
    engine.zero_ring()
    assert not any(view.page(region, POOLED).any() for region in DRAFTS)
    run_step(engine, plan(2, loads=None))
    assert drafts_hold(view, POOLED, OLD)


@pytest.mark.parametrize("driver", ["cuda"], indirect=True)
class TestInGraphs:
    """A graph copies no draft page: its launch comes after those of the step."""

    @pytest.fixture
    def model(
        self,
        kernel: GatherKernel,
        engine: TransferEngine,
        stream: DriverStream,
        capture: Callable[..., GraphModel],
    ) -> GraphModel:
        """A model that writes nothing, in an engine with draft layers."""
        del kernel
        engine.graphs.prepare(IMAGE, PIECES)
        return capture(engine, stream)

    def test_drafts_behind_a_replay_find_their_pages(
        self, model: GraphModel, stream: DriverStream, view: View
    ) -> None:
        write(view, RESIDENT, OLD)
        inject(model.engine, "late", milliseconds=8)
        seen: list[bool] = []
        model.run(plan(1, stores=((RESIDENT, 0, 1),), loads=((POOLED, 0, 1),)))
        stream.launch(lambda: seen.append(drafts_hold(view, POOLED, OLD)))
        stream.launch(lambda: write_drafts(view, RESIDENT, NEW))
        model.run(plan(2, promotions=((5, 0, 1),), loads=None))
        stream.launch(lambda: seen.append(drafts_hold(view, 5, OLD)))
        stream.synchronize()
        model.engine.drain()
        assert seen == [True, True]
        assert row_holds(view, 0, OLD)

    def test_copies_wait_for_drafts_before_the_replay(
        self, model: GraphModel, stream: DriverStream, view: View
    ) -> None:
        write(view, RESIDENT, OLD)
        model.run(plan(1))
        with latched(stream):
            stream.launch(lambda: write_drafts(view, RESIDENT, NEW))
            model.run(plan(2, stores=((RESIDENT, 0, 1),)))
            time.sleep(DELAY)
        stream.synchronize()
        model.engine.drain()
        assert all(view.row_holds(0, region, NEW) for region in DRAFTS)

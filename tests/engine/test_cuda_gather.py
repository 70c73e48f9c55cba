"""Loads by the gather kernel, over the stand-in for libcuda: which are, and their order."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import TransferError
from pie_vllm.geometry import Geometry
from tests.engine.driving import PAGE, View, inject, latched, plan, run_step
from tests.engine.gathering import (
    FEWEST,
    FIRST,
    LAYERS,
    PAGE_BYTES,
    SIZES,
    Paths,
    Seen,
    Triples,
    singles,
    write_rows,
)
from tests.engine.test_random_plans import Runner
from tests.helpers.gather_kernel import IMAGE, GatherKernel
from tests.helpers.standin import load
from tests.helpers.streams import DriverStream

MakeEngine = Callable[..., TransferEngine]
pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture(params=["cuda"])
def driver(driver: str) -> str:
    """Only this one."""
    return driver


@pytest.fixture
def engine(make_engine: MakeEngine) -> TransferEngine:
    """Single pages are the kernel's, pairs are not."""
    engine = make_engine(**SIZES)
    engine.use_gather(IMAGE, PAGE_BYTES + 1)
    return engine


def paths(engine: TransferEngine, loads: Triples, stores: Triples = ()) -> Paths:
    """How the loads of a layer go, by the kernel and by the copy engines; stores never are its."""
    before = Paths.now()
    run_step(engine, plan(int(time.monotonic() * 1e6), loads=loads, stores=stores))
    done = before.since()
    layers = len(LAYERS)
    assert done.launches % layers == done.batches % layers == 0
    return Paths(done.launches // layers, done.batches // layers - bool(stores))


KERNEL, ENGINES, EACH = Paths(1, 0), Paths(0, 1), Paths(1, 1)
FOUR = (FIRST + 16, 16, 4)


@pytest.mark.parametrize(
    ("threshold", "loads", "expected"),
    [
        (1001, singles(16), KERNEL),
        (1001, singles(40), KERNEL),
        (1001, singles(15), ENGINES),
        (1000, singles(16), ENGINES),
        (1 << 40, singles(16), KERNEL),
        # Each run goes the way that its own length says.
        (1001, (*singles(16), FOUR), EACH),
        (4000, (FOUR, *singles(16)), EACH),
        (4001, (*singles(16), FOUR), KERNEL),
        (4001, (*singles(15), FOUR), KERNEL),
        (4000, (*singles(15), FOUR), ENGINES),
        (0, singles(16), ENGINES),
    ],
)
def test_short_runs_are_the_kernels(
    engine: TransferEngine, threshold: int, loads: Triples, expected: Paths
) -> None:
    engine.use_gather(IMAGE, threshold)
    assert paths(engine, loads) == expected
    assert paths(engine, loads, stores=tuple((i, 40 + i, 1) for i in range(20))) == expected


def test_short_and_long_runs_of_a_step(engine: TransferEngine) -> None:
    """Each block is copied, whichever way; promotions and loads count together."""
    view = View(engine)
    write_rows(engine, 40)
    seen = Seen(engine, 24)
    promotions = ((1, 30, 1), (3, 32, 3), (9, 37, 1))
    loads = (*singles(10), (FIRST + 10, 10, 4), *singles(4, row=14, block=FIRST + 14))
    loads += ((FIRST + 18, 18, 6),)
    before = Paths.now()
    stats = run_step(engine, plan(1, loads=loads, promotions=promotions), attend=seen)
    assert (seen.wrong, seen.layers) == ([], list(LAYERS))
    for block, tag in ((1, 31), (3, 33), (5, 35), (9, 38)):
        assert all(view.holds(layer, block, tag) for layer in LAYERS)
    assert before.since() == (6, 2 * 6)
    assert stats.copies == 6 * (len(promotions) + len(loads))
    assert stats.bytes_loaded == 6 * 29 * PAGE_BYTES
    assert stats.bytes_promoted == 6 * 5 * PAGE_BYTES


def test_one_table_a_step(make_engine: MakeEngine) -> None:
    """Whatever the number of pieces: one copy of it, then a launch a layer."""
    engine = make_engine(num_layers=20, ring_slots=3, page_bytes=16, pooled_blocks=1200, rows=1200)
    engine.use_gather(IMAGE, 100)
    calls = "cuMemcpy2DAsync", "cuLaunchKernel", "cuMemcpyBatchAsync", "cuMemcpyHtoDAsync"
    before = [load().calls(name) for name in calls]
    for step in (1, 2):
        run_step(engine, plan(step, loads=tuple((8 + i, 1142 - i, 1) for i in range(1142))))
    found = [load().calls(name) - old for name, old in zip(calls, before, strict=True)]
    assert found == [2, 2 * 20, 0, 0]


def test_it_copies_what_the_copy_engines_do(engine: TransferEngine, kernel: GatherKernel) -> None:
    """Promotions in the same batches too; the counters are the same."""
    view, tried = View(engine), kernel.pieces
    write_rows(engine, 40)
    found = []
    for threshold, step in ((1 << 20, 1), (0, 3)):
        engine.use_gather(IMAGE, threshold, blocks=3)
        before = counters(engine, "load")
        seen = Seen(engine, 20)
        promotions = ((3, 30, 2), (7, 33, 1))
        stats = run_step(engine, plan(step, loads=singles(20), promotions=promotions), attend=seen)
        engine.drain()
        assert (seen.wrong, seen.layers) == ([], list(LAYERS))
        assert all(view.holds(layer, 4, 32) and view.holds(layer, 7, 34) for layer in LAYERS)
        after = counters(engine, "load")
        found.append((after.bytes - before.bytes, after.copies - before.copies, stats.copies))
        for block in (3, 4, 7, *range(FIRST, FIRST + 20)):
            view.write_all(block, 99)
    assert found[0] == found[1] == (6 * 23 * PAGE_BYTES, 6 * 22, 6 * 22)
    assert kernel.pieces - tried >= 6 * 22
    assert kernel.grid == 3


def test_copies_have_a_time(engine: TransferEngine, kernel: GatherKernel) -> None:
    kernel.wait(3)
    engine.run_idle(plan(1, promotions=singles(16, block=0), forward=False))
    engine.drain()
    assert counters(engine, "load").seconds >= 6 * 0.003


def test_self_test_passes_beside_it(engine: TransferEngine) -> None:
    engine.self_test()
    write_rows(engine)
    seen = Seen(engine)
    run_step(engine, plan(1, loads=singles()), attend=seen)
    assert seen.wrong == []


# Rules 2, 1 and 5 of csrc/DESIGN.md; the stand-in's race check sees what the kernel accesses.


def test_the_kernel_waits_for_stores_of_its_rows(engine: TransferEngine) -> None:
    view, seen = View(engine), Seen(engine)
    for i in range(FEWEST):
        view.write_all(i, 1 + i)
    inject(engine, "late", direction="store", milliseconds=10)
    stores = tuple((i, i, 1) for i in range(FEWEST))
    run_step(engine, plan(1, stores=stores, loads=singles()), attend=seen)
    assert (seen.wrong, seen.layers) == ([], list(LAYERS))


def test_stores_wait_for_the_kernel(
    engine: TransferEngine, stream: DriverStream, kernel: GatherKernel
) -> None:
    write_rows(engine)
    seen, view = Seen(engine), View(engine)
    view.write_all(3, 77)
    kernel.wait(5)
    run_step(engine, plan(1, loads=singles()), attend=seen, stream=stream)
    run_step(engine, plan(2, stores=((3, 5, 1),)), stream=stream)
    stream.synchronize()
    engine.drain()
    assert seen.wrong == []
    assert all(view.row_holds(5, layer, 77) for layer in LAYERS)


def test_the_kernel_waits_for_the_last_user_of_its_slot(
    engine: TransferEngine, stream: DriverStream, kernel: GatherKernel
) -> None:
    write_rows(engine, 40)
    first, second = Seen(engine), Seen(engine, tag=17)

    def slow(layer: int) -> None:
        time.sleep(0.01)
        first(layer)

    kernel.wait(2)
    run_step(engine, plan(1, loads=singles()), attend=slow, stream=stream)
    run_step(engine, plan(2, loads=singles(row=16)), attend=second, stream=stream)
    run_step(engine, plan(3, loads=None), attend=second, stream=stream)
    stream.synchronize()
    assert (first.wrong, second.wrong) == ([], [])
    assert len(second.layers) == 12


def test_several_steps_in_flight(engine: TransferEngine, stream: DriverStream) -> None:
    """They are submitted while compute stands still."""
    write_rows(engine, 40)
    steps = [Seen(engine, tag=1 + row) for row in range(8)]
    before = Paths.now()
    with latched(stream):
        for row, seen in enumerate(steps):
            run_step(engine, plan(row + 1, loads=singles(row=row)), attend=seen, stream=stream)
        assert before.since() == (8 * 6, 0)
        assert not any(seen.layers for seen in steps)
    stream.synchronize()
    assert [seen.wrong for seen in steps] == [[]] * 8


def test_tables_are_used_again_only_after_their_launch(
    engine: TransferEngine, stream: DriverStream, kernel: GatherKernel
) -> None:
    """More steps than buffers, faster than they run: the fixture compares the tables."""
    write_rows(engine, 56)
    kernel.wait(0.5)
    before, steps = Paths.now(), []
    for number in range(55):
        row = number % 40
        steps.append(Seen(engine, tag=1 + row))
        run_step(engine, plan(number + 1, loads=singles(row=row)), attend=steps[-1], stream=stream)
    assert before.since() == (330, 0)
    stream.synchronize()
    assert [seen.wrong for seen in steps] == [[]] * 55


def test_a_table_of_several_tiles(make_engine: MakeEngine, kernel: GatherKernel) -> None:
    engine = make_engine(
        num_layers=2, ring_slots=1, page_bytes=24, pooled_blocks=5000, rows=5000, chunk_rows=5000
    )
    engine.use_gather(IMAGE, 100)
    write_rows(engine, 5000)
    view, wrong, before, tried = View(engine), [], Paths.now(), kernel.pieces

    def attend(layer: int) -> None:
        wrong.extend(i for i in range(5000) if not view.holds(layer, 8 + i, 1 + i))

    run_step(engine, plan(1, loads=singles(5000, block=8)), attend=attend)
    assert wrong == []
    assert before.since() == (2, 0)
    assert kernel.pieces - tried == 2 * 5000


def test_more_pieces_than_a_table_holds(make_engine: MakeEngine, kernel: GatherKernel) -> None:
    """The others are the copy engines'."""
    count = 65536 + 100
    engine = make_engine(
        num_layers=1, ring_slots=1, page_bytes=16, pooled_blocks=count, rows=count, chunk_rows=count
    )
    load().set(race_check=0)
    engine.use_gather(IMAGE, 100)
    view, before, tried = View(engine), Paths.now(), kernel.pieces
    checked = (0, 65535, 65536, count - 1)
    for i in checked:
        view.write_row(i, 1 + i % 200)
    wrong: list[int] = []

    def attend(layer: int) -> None:
        wrong.extend(i for i in checked if not view.holds(layer, 8 + i, 1 + i % 200))

    run_step(engine, plan(1, loads=singles(count, block=8)), attend=attend)
    assert wrong == []
    assert kernel.pieces - tried == 65536
    assert before.since() == (1, 1)


def test_promotions_of_an_aborted_step_are_the_kernels_too(engine: TransferEngine) -> None:
    """Those of all layers; what the step was to load is not loaded."""
    view = View(engine)
    write_rows(engine, 40)
    for block in range(FIRST, FIRST + 20):
        view.write_all(block, 99)
    before = Paths.now()
    engine.begin_step(plan(1, loads=singles(20), promotions=singles(16, row=20, block=2)))
    engine.abort_step()
    assert before.since() == (6, 0)
    assert all(view.holds(layer, 2 + i, 21 + i) for layer in LAYERS for i in range(16))
    assert view.holds(0, FIRST, 1)
    assert view.holds(5, FIRST, 99)  # the last that was written to that slot


def test_a_table_that_did_not_go_fails_its_step_and_comes_again(engine: TransferEngine) -> None:
    """An abort makes the promotions all the same."""
    view, standin = View(engine), load()
    write_rows(engine, 40)
    for function in ("cuMemcpy2DAsync", "cuEventRecord"):
        standin.fail(function, error=2)
        with pytest.raises(TransferError, match=f"{function}.*OUT_OF_MEMORY"):
            engine.begin_step(plan(1, promotions=singles(16, block=0)))
        standin.clear()
        engine.abort_step()
        seen = Seen(engine, 20)
        run_step(engine, plan(3, loads=singles(20), promotions=singles(16, block=0)), attend=seen)
        assert seen.wrong == []
        assert all(view.holds(layer, i, 1 + i) for layer in LAYERS for i in range(16))


def test_it_is_not_changed_inside_a_step(engine: TransferEngine) -> None:
    engine.begin_step(plan(1, loads=singles()))
    with pytest.raises(TransferError, match="use_gather inside a step"):
        engine.use_gather(None, 0)
    engine.abort_step()


def test_a_device_with_its_own_addresses(make_engine: MakeEngine) -> None:
    """Tables and chunks, which come and go, have other addresses there."""
    load().set(can_use_host_pointer=0)
    engine = make_engine(chunks=1, **SIZES)
    engine.use_gather(IMAGE, 1001)
    engine.commit_chunk(1)
    for number in (1, 2):
        write_rows(engine, FEWEST, row=32)
        seen, before = Seen(engine), Paths.now()
        run_step(engine, plan(number, loads=singles(row=32)), attend=seen)
        assert seen.wrong == []
        assert before.since() == (6, 0)
        engine.release_chunk(1)
        engine.commit_chunk(1)


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "async"])
@pytest.mark.parametrize("late", [0.0, 0.3])
@pytest.mark.parametrize("own_addresses", [False, True])
def test_random_plans(
    driver: str, kernel: GatherKernel, inline: bool, late: float, own_addresses: bool
) -> None:
    """Some batches are the kernel's, some are not."""
    load().set(can_use_host_pointer=int(not own_addresses))
    before = Paths.now()
    for seed in range(3):
        page = (200, 1000, 2504)[seed]
        sizes = Geometry(4, page, 60, 90, 2, 150, 80, PAGE)
        with TransferEngine(sizes, driver=driver) as engine:
            engine.use_gather(IMAGE, int(page * (1.6 + seed / 10)))
            runner = Runner(engine, seed, inline, runs=60)
            kernel.wait(late)
            inject(engine, "late", direction="store", milliseconds=late / 10, up_to=late)
            for _ in range(15):
                runner.step()
            runner.finish()
            kernel.wait(0)
    done = before.since()
    assert done.launches > 20
    assert done.batches > 20

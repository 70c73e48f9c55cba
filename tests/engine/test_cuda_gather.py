"""Loads by the gather kernel, over the stand-in for libcuda: which are, and their order."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
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


def by_kernel(engine: TransferEngine, loads: Triples, stores: Triples = ()) -> bool:
    """Whether these loads are; never partly, and stores never are."""
    before = Paths.now()
    run_step(engine, plan(int(time.monotonic() * 1e6), loads=loads, stores=stores))
    done = before.since()
    layers = len(LAYERS)
    batches = done.batches - layers * bool(stores)
    assert (done.launches, batches) in ((layers, 0), (0, layers))
    return batches == 0


@pytest.mark.parametrize(
    ("threshold", "loads", "expected"),
    [
        (1001, singles(16), True),
        (1001, singles(40), True),
        (1001, singles(15), False),
        (1000, singles(16), False),
        (1 << 40, singles(16), True),
        # On average: 16 singles and a run of four are 1176 bytes.
        (1177, (*singles(16), (FIRST + 16, 16, 4)), True),
        (1176, (*singles(16), (FIRST + 16, 16, 4)), False),
        (0, singles(16), False),
    ],
)
def test_small_pieces_are_the_kernels(
    engine: TransferEngine, threshold: int, loads: Triples, expected: bool
) -> None:
    engine.use_gather(IMAGE, threshold)
    assert by_kernel(engine, loads) is expected
    assert by_kernel(engine, loads, stores=tuple((i, 40 + i, 1) for i in range(20))) is expected


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
    """More launches than tables, faster than they run: the fixture compares the tables."""
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


def test_a_batch_larger_than_a_table(make_engine: MakeEngine, kernel: GatherKernel) -> None:
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
    assert before.since() == (2 * 2, 0)
    assert kernel.pieces - tried == 2 * 5000


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

"""Rules 24 and 25: compute without gates, such as that of sliding windows, before and in a step."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pie_vllm.engine.native import (
    PLAN_AFTER_ALL,
    PLAN_PROMOTIONS_FIRST,
    PLAN_STORES_AFTER_ALL,
    PLAN_STORES_FIRST,
)
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import CopyError
from pie_vllm.plan import StepPlan
from tests.engine.driving import PAGE, View, host_only, inject, latched, plan, run_step
from tests.engine.test_order import DELAY, LAYERS, NEW, OLD, rows_hold, settle
from tests.helpers.builds import build_program, program_over_library
from tests.helpers.standin import ENVIRONMENT, include_folder, library_folder, load
from tests.helpers.streams import DriverStream

REGIONS = range(8)
MakeEngine = Callable[..., TransferEngine]


@pytest.fixture
def engine(make_engine: MakeEngine) -> TransferEngine:
    """Six layers with a pool, and two regions more."""
    return make_engine(extra_regions=2)


def write_regions(view: View, block: int, tag: int) -> None:
    """What a group without a pool does, and zeroing."""
    for region in REGIONS:
        view.write(region, block, tag)


def pass_gates(engine: TransferEngine, attend: Callable[[int], object] | None = None) -> None:
    for layer in LAYERS:
        engine.before_write(layer)
        engine.before_attention(layer)
        if attend is not None:
            attend(layer)
        engine.after_attention(layer)
    engine.end_step()


@pytest.mark.parametrize("stores_first", [True, False])
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("inline", [True, False])
def test_compute_waits_for_the_stores_of_all_layers(
    engine: TransferEngine,
    stream: DriverStream,
    view: View,
    stores_first: bool,
    head_first: bool,
    inline: bool,
) -> None:
    """A page that a group without gates has been given is written ahead of the first gate."""
    write_regions(view, 3, OLD)
    engine.submit_head_first(head_first)
    inject(engine, "late", direction="store", milliseconds=10)
    step = plan(1, stores=((3, 0, 1),), stores_first=stores_first)
    engine.begin_step(step, 0 if inline else stream.id)
    if inline:
        write_regions(view, 3, NEW)
    else:
        stream.launch(lambda: write_regions(view, 3, NEW))
    pass_gates(engine)
    settle(engine, stream)
    assert (rows_hold(view, 0, OLD) == []) is stores_first
    assert all(view.holds(region, 3, NEW) for region in REGIONS)


def test_compute_waits_for_the_stores_of_an_idle_step(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """By rule 7, with the flag as without it."""
    write_regions(view, 3, OLD)
    inject(engine, "late", direction="store", milliseconds=10)
    engine.run_idle(plan(1, stores=((3, 0, 1),), forward=False, stores_first=True), stream.id)
    stream.launch(lambda: write_regions(view, 3, NEW))
    settle(engine, stream)
    assert rows_hold(view, 0, OLD) == []


@pytest.mark.parametrize("driver", ["cuda"], indirect=True)
@pytest.mark.parametrize(("stores_first", "waits"), [(True, 0), (False, 5)])
def test_gates_wait_for_no_store_again(
    engine: TransferEngine, stream: DriverStream, stores_first: bool, waits: int
) -> None:
    """Each wait costs a call, and more where the stall is timed."""
    engine.begin_step(plan(1, stores=((3, 0, 1),), stores_first=stores_first), stream.id)
    engine.before_write(0)
    before = load().calls("cuStreamWaitEvent")
    for layer in LAYERS[1:]:
        engine.before_write(layer)
    assert load().calls("cuStreamWaitEvent") - before == waits
    engine.abort_step()


def test_steps_after_one_another_store_what_was_there(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """Over an abort, too."""
    for number, abort in ((1, False), (2, True), (3, False)):
        write_regions(view, 3, OLD + number)
        engine.begin_step(plan(number, stores=((3, 0, 1),), stores_first=True), stream.id)
        if abort:
            engine.before_write(0)
            engine.abort_step()
        else:
            pass_gates(engine)
        settle(engine, stream)
        assert rows_hold(view, 0, OLD + number) == []


@host_only
def test_a_store_that_fails_ends_the_step_where_compute_waits_for_it(
    engine: TransferEngine, view: View
) -> None:
    write_regions(view, 3, OLD)
    inject(engine, "fail", direction="store", nth=4)
    with pytest.raises(CopyError, match="stream of stores"):
        engine.begin_step(plan(1, stores=((3, 0, 1),), stores_first=True))
    run_step(engine, plan(2, stores=((3, 0, 1),), stores_first=True))
    engine.drain()
    assert rows_hold(view, 0, OLD) == []


def idle(engine: TransferEngine, step: StepPlan, stream: DriverStream) -> None:
    engine.run_idle(step, stream.id)


def piecewise(engine: TransferEngine, step: StepPlan, stream: DriverStream) -> None:
    run_step(engine, step, stream=stream)


@pytest.mark.parametrize("after_all", [True, False])
@pytest.mark.parametrize("run", [piecewise, idle])
def test_promotions_wait_for_all_compute_before_them(
    engine: TransferEngine,
    stream: DriverStream,
    view: View,
    run: Callable[[TransferEngine, StepPlan, DriverStream], None],
    after_all: bool,
) -> None:
    """A layer without gates reads a page after the last gate; then the page changes hands."""
    write_regions(view, 3, OLD)
    view.write_row(1, NEW)
    run_step(engine, plan(1), stream=stream)
    seen: list[bool] = []
    with latched(stream):
        stream.launch(lambda: seen.extend(view.holds(region, 3, OLD) for region in REGIONS))
        run(engine, plan(2, promotions=((3, 1, 1),), after_all=after_all), stream)
        time.sleep(DELAY)
    settle(engine, stream)
    assert all(seen) is after_all
    assert all(view.holds(layer, 3, NEW) for layer in LAYERS)


def test_stores_do_not_wait_for_all_compute(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """They read what a layer with gates wrote, and run beside the end of the step before."""
    view.write_all(3, OLD)
    run_step(engine, plan(1), stream=stream)
    with latched(stream):
        step = plan(2, stores=((3, 0, 1),), promotions=((4, 1, 1),), after_all=True)
        engine.begin_step(step, stream.id)
        deadline = time.monotonic() + 5
        while not view.row_holds(0, 0, OLD) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert view.row_holds(0, 0, OLD)
    engine.abort_step()


@pytest.mark.parametrize("stores_after_all", [True, False])
@pytest.mark.parametrize("run", [piecewise, idle])
def test_stores_of_what_has_no_gates_wait_for_all_compute_before_them(
    engine: TransferEngine,
    stream: DriverStream,
    view: View,
    run: Callable[[TransferEngine, StepPlan, DriverStream], None],
    stores_after_all: bool,
) -> None:
    """A window's page is written after the last gate; then its request is preempted."""
    write_regions(view, 3, OLD)
    run_step(engine, plan(1), stream=stream)
    with latched(stream):
        stream.launch(lambda: write_regions(view, 3, NEW))
        run(engine, plan(2, stores=((3, 0, 1),), stores_after_all=stores_after_all), stream)
        time.sleep(DELAY)
    settle(engine, stream)
    assert (rows_hold(view, 0, NEW) == []) is stores_after_all


@pytest.mark.parametrize("promotions_first", [True, False])
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("loads", [(), ((8, 2, 2),)])
def test_compute_waits_for_the_promotions_of_all_layers(
    engine: TransferEngine,
    stream: DriverStream,
    view: View,
    promotions_first: bool,
    head_first: bool,
    inline: bool,
    loads: tuple[tuple[int, int, int], ...],
) -> None:
    """A window's page that a step fills is read ahead of the first gate; loads come as ever."""
    write_regions(view, 3, OLD)
    for row in (1, 2, 3):
        view.write_row(row, NEW + row)
    engine.submit_head_first(head_first)
    inject(engine, "late", direction="load", milliseconds=10)
    seen: list[bool] = []

    def read() -> None:
        seen.extend(view.holds(layer, 3, NEW + 1) for layer in LAYERS)

    def attend(layer: int) -> None:
        for block, row, _ in loads:
            seen.append(view.holds(layer, block, NEW + row))

    step = plan(1, promotions=((3, 1, 1),), loads=loads, promotions_first=promotions_first)
    engine.begin_step(step, 0 if inline else stream.id)
    if inline:
        read()
    else:
        stream.launch(read)
    pass_gates(engine, attend if inline else lambda layer: stream.launch(lambda: attend(layer)))
    settle(engine, stream)
    assert all(seen) is promotions_first
    assert all(view.holds(layer, 3, NEW + 1) for layer in LAYERS)


def test_stores_come_before_promotions_that_come_first(
    engine: TransferEngine, stream: DriverStream, view: View
) -> None:
    """A page may be stored and filled in one step; bytes are counted once."""
    write_regions(view, 3, OLD)
    view.write_row(1, NEW)
    inject(engine, "late", direction="store", milliseconds=10)
    step = plan(
        1, stores=((3, 0, 1),), promotions=((3, 1, 1),), loads=((8, 2, 1),), promotions_first=True
    )
    stats = run_step(engine, step, stream=stream)
    settle(engine, stream)
    assert rows_hold(view, 0, OLD) == []
    assert all(view.holds(layer, 3, NEW) for layer in LAYERS)
    page = engine.geometry.row_bytes
    assert (stats.bytes_promoted, stats.bytes_loaded, stats.bytes_stored) == (page, 2 * page, page)


def test_promotions_that_come_first_survive_an_abort(engine: TransferEngine, view: View) -> None:
    """They are there before the first gate; the next step begins anew."""
    view.write_row(1, NEW)
    engine.begin_step(plan(1, promotions=((3, 1, 1),), promotions_first=True))
    engine.before_write(0)
    engine.abort_step()
    assert all(view.holds(layer, 3, NEW) for layer in LAYERS)
    run_step(engine, plan(2, promotions=((4, 1, 1),), promotions_first=True))
    assert all(view.holds(layer, 4, NEW) for layer in LAYERS)


@host_only
def test_a_promotion_that_fails_ends_the_step_where_compute_waits_for_it(
    engine: TransferEngine, view: View
) -> None:
    """As a store that does."""
    view.write_row(1, NEW)
    inject(engine, "fail", direction="load", nth=4)
    with pytest.raises(CopyError, match="stream of loads"):
        engine.begin_step(plan(1, promotions=((3, 1, 1),), promotions_first=True))
    run_step(engine, plan(2, promotions=((3, 1, 1),), promotions_first=True))
    assert all(view.holds(layer, 3, NEW) for layer in LAYERS)


# Random plans of two groups.


@pytest.fixture(scope="module")
def random_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    return program_over_library("random_groups", tmp_path_factory.mktemp("groups"))


def run_random(program: Path, seeds: int, driver: str, lacking: int = 0) -> tuple[int, str]:
    """Status and output; more than 1 is no finding."""
    environment = {"PATH": "/usr/bin:/bin"}
    if driver == "cuda":
        if include_folder() is None:
            pytest.skip("no cuda.h: neither the package nvidia-cuda-runtime nor a toolkit")
        environment["LD_LIBRARY_PATH"] = str(library_folder())
        environment[ENVIRONMENT] = f"granularity={PAGE}"
    command = [str(program), "1", str(seeds), driver, str(lacking)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["host", "cuda"])
def test_every_page_holds_what_the_model_says(random_groups: Path, kind: str) -> None:
    """On the stand-in for libcuda no access is unordered either."""
    status, output = run_random(random_groups, 200, kind)
    assert status == 0, output
    assert "200 seeds, no wrong byte" in output


@pytest.mark.parametrize("kind", ["host", "cuda"])
@pytest.mark.parametrize(
    "lacking",
    [PLAN_STORES_FIRST, PLAN_AFTER_ALL, PLAN_STORES_AFTER_ALL, PLAN_PROMOTIONS_FIRST],
)
def test_a_flag_that_plans_lack_is_found(random_groups: Path, kind: str, lacking: int) -> None:
    status, output = run_random(random_groups, 200, kind, lacking)
    assert status == 1, output
    found = "standin_violations: unordered" if kind == "cuda" else "does not hold"
    assert found in output


@pytest.mark.sanitizer
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_random_groups_under_a_sanitizer(
    tmp_path: Path, sanitize: str, run_native: Callable[..., str]
) -> None:
    program = build_program("random_groups", tmp_path, sanitize)
    for driver in ("host", "cuda"):
        output = run_native(program, "1", "40", driver, libraries=library_folder(sanitize))
        assert "40 seeds, no wrong byte" in output

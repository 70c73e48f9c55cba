"""The CUDA driver over the stand-in for libcuda: what it does otherwise than the host driver."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pie_vllm.engine.link_calibration import measure_link
from pie_vllm.engine.native import driver_granularity
from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import TransferError, UnsupportedError
from tests.engine.driving import PAGE, View, geometry, plan, run_step
from tests.helpers.standin import Standin, load
from tests.helpers.streams import DriverStream

LAYERS = range(6)
MakeEngine = Callable[..., TransferEngine]


@pytest.fixture(params=["cuda"])
def driver(driver: str) -> str:
    """Only this one."""
    return driver


@pytest.fixture
def standin(driver: str) -> Iterator[Standin]:
    """The stand-in, whose faults a test may set."""
    assert driver == "cuda"
    yield load()
    load().clear()


def steps(engine: TransferEngine, count: int, stream: DriverStream | None = None) -> None:
    """Steps from 1 on that store one block and load one; their copies are over when each ends."""
    for number in range(1, count + 1):
        run_step(engine, plan(number, stores=((0, 0, 1),), loads=((8, 0, 1),)), stream=stream)
        engine.drain()


@pytest.mark.alone
def test_one_step_in_four_is_timed(engine: TransferEngine, standin: Standin) -> None:
    """Its stall is reported with a later step; the others take no events with time."""
    stream = DriverStream(engine)
    steps(engine, 1, stream)
    stream.synchronize()
    before = standin.calls("cuEventElapsedTime")
    standin.delay(5, 5, 1)
    found = []
    for number in range(2, 8):
        found.append(run_step(engine, plan(number, loads=((8, 0, 1),)), stream=stream))
        stream.synchronize()
    timed = [stats for stats in found if stats.stall_step >= 0]
    assert [(stats.step, stats.stall_step) for stats in timed] == [(5, 4)]
    # A ring of two slots: layer after layer waits for its own batch.
    assert 0.02 <= timed[0].stall_seconds < 0.2
    assert sum(stats.stall_seconds for stats in found) == timed[0].stall_seconds
    # Once for each wait of that step, for one that waits for nothing, and for each of its batches.
    assert standin.calls("cuEventElapsedTime") - before == 2 * len(LAYERS) + 1
    stream.close()


def test_time_of_untimed_copies_is_that_of_timed_ones(
    make_engine: MakeEngine, standin: Standin
) -> None:
    engine = make_engine(page_bytes=200_000)
    standin.link(50e6)
    steps(engine, 7)
    total = counters(engine, "load")
    assert (total.bytes, total.copies) == (7 * 6 * 200_000, 7 * 6)
    # Of steps 4 to 7, of which one is timed: nothing is known of those before. No upper bound: the
    # link only says how long a copy takes at least.
    assert total.seconds >= 0.95 * 4 * 6 * 200_000 / 50e6


@pytest.mark.alone
def test_the_link_is_measured(standin: Standin) -> None:
    standin.link(2e8)
    found = measure_link(8, 65_536, granularity=PAGE, driver="cuda")
    for speed in (found.load, found.load_both, found.store_both):
        assert 0.05 * 2e8 <= speed <= 1.02 * 2e8  # less on a busy machine


def test_the_layers_of_a_step_are_batches(engine: TransferEngine, standin: Standin) -> None:
    before = standin.calls("cuMemcpyBatchAsync")
    run_step(engine, plan(1, loads=((8, 0, 2), (11, 4, 1)), stores=((0, 7, 1),)))
    assert standin.calls("cuMemcpyBatchAsync") - before == 2 * 6
    assert standin.calls("cuMemcpyHtoDAsync") == 0


@pytest.mark.parametrize(
    "settings", [{"driver_version": 12000}, {"batch_supported": 0}, {"driver_version": 12080}]
)
def test_drivers_with_other_copies(
    settings: dict[str, int], standin: Standin, tmp_path: Any
) -> None:
    """Copy by copy where there are no batches; CUDA 12.8's batches have another signature."""
    del tmp_path
    standin.set(**settings)
    run_alone(f"standin.set(**{settings!r})", "engine.self_test(); load_one(engine)")


def run_alone(prepare: str, body: str) -> str:
    """A process of its own, because the driver's functions are looked up once a process."""
    import subprocess
    import sys

    code = f"""
from tests.helpers.standin import load
from tests.engine.driving import *
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import PieError
standin = load()
standin.set(granularity=PAGE)
{prepare}
def load_one(engine):
    view, seen = View(engine), []
    view.write_row(0, 9)
    run_step(engine, plan(1, loads=((8, 0, 1),)),
             attend=lambda layer: seen.append(view.holds(layer, 8, 9)))
    engine.drain()
    assert seen == [True] * 6, seen
try:
    with TransferEngine(geometry(), driver="cuda") as engine:
        {body}
except PieError as error:
    print(type(error).__name__, error)
assert standin.violations() == [], standin.violations()
assert standin.live() == [], standin.live()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        ("standin.set(device_count=0)", "no such CUDA device is visible"),
        ("standin.set(vmm_supported=0)", "no virtual memory management"),
        ("standin.set(integrated=1)", "shares the CPU's memory .* Use --block-manager default"),
        ("standin.set(driver_version=11080)", "update it"),
        ('standin.fail("cuInit", error=803)', "differ; restart the machine"),
        ("standin.set(device_memory=1 << 15)", "lower --gpu-memory-utilization"),
        ("standin.set(register_limit=1 << 12)", "lower --pie-pool-gib"),
    ],
)
def test_a_machine_that_cannot_is_refused_by_name(prepare: str, text: str) -> None:
    """One line that says what to do; nothing stays behind."""
    found = run_alone(prepare, "pass")
    assert re.search(text, found)
    assert len(found.splitlines()) == 1


FAILING = (
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemsetD8Async",
    "cuMemHostRegister",
    "cuStreamCreateWithPriority",
    "cuEventCreate",
    "cuDevicePrimaryCtxRetain",
    "cuMemGetAllocationGranularity",
    "cuCtxGetStreamPriorityRange",
)


@pytest.mark.parametrize("function", FAILING)
def test_a_start_that_fails_half_way_leaves_nothing(function: str, standin: Standin) -> None:
    """Each call of each function in turn fails; the error names it, and all is given back."""
    before = standin.calls(function)
    with TransferEngine(geometry(), driver="cuda"):
        calls = standin.calls(function) - before
    assert calls > 0
    for nth in range(1, calls + 1):
        standin.fail(function, nth)
        with pytest.raises(TransferError, match=f"{function}.*CUDA_ERROR_OUT_OF_MEMORY"):
            TransferEngine(geometry(), driver="cuda")
        standin.clear()
        assert standin.live() == []


SUBMISSIONS = ("cuMemcpyBatchAsync", "cuEventRecord", "cuStreamWaitEvent")


@pytest.mark.parametrize("function", SUBMISSIONS)
@pytest.mark.parametrize("nth", [1, 2, 5, 9, 14])
@pytest.mark.parametrize("inline", [True, False])
def test_a_submission_that_fails_fails_its_step(
    engine: TransferEngine, standin: Standin, function: str, nth: int, inline: bool
) -> None:
    """Never a hang or a wrong page; after an abort the engine goes on."""
    view = View(engine)
    stream = None if inline else DriverStream(engine)
    standin.fail(function, nth, error=2)
    with pytest.raises(TransferError, match=f"{function}.*CUDA_ERROR_OUT_OF_MEMORY"):
        steps(engine, 3, stream)
    engine.abort_step()
    if stream:
        stream.synchronize()
    view.write_row(0, 7)
    seen: list[bool] = []
    run_step(
        engine,
        plan(9, loads=((8, 0, 1),)),
        attend=lambda layer: seen.append(view.holds(layer, 8, 7)),
        stream=stream,
    )
    if stream:
        stream.synchronize()
    assert seen == [True] * 6


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("nth", [1, 4, 6])
@pytest.mark.parametrize("inline", [True, False])
def test_a_copy_that_fails_takes_the_context_with_it(
    engine: TransferEngine, standin: Standin, direction: int, nth: int, inline: bool
) -> None:
    """The step ends in an error that says so; abort cannot help; close gives everything back."""
    stream = None if inline else DriverStream(engine)
    standin.fail_copy(direction, nth)
    with pytest.raises(TransferError, match="restart the server"):
        steps(engine, 3, stream)
    with pytest.raises(TransferError, match="restart the server"):
        engine.abort_step()
    with pytest.raises(TransferError):
        engine.begin_step(plan(9))
    engine.close()


def test_a_chunk_that_cannot_be_registered_is_refused(
    make_engine: MakeEngine, standin: Standin
) -> None:
    """It is not there, and can be had later."""
    engine = make_engine(chunks=1)
    before = engine.host_bytes
    for error, text in ((2, "lower --pie-pool-gib"), (800, "ulimit"), (801, "NOT_SUPPORTED")):
        standin.fail("cuMemHostRegister", 1, error=error)
        with pytest.raises((TransferError, UnsupportedError), match=text):
            engine.commit_chunk(1)
        assert engine.host_bytes == before
    engine.commit_chunk(1)
    assert engine.host_bytes > before


def test_chunks_come_and_go_in_another_thread(make_engine: MakeEngine) -> None:
    """The other thread has no context of its own."""
    engine = make_engine(chunks=1)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            engine.commit_chunk(1)
            engine.release_chunk(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_granularity_is_the_devices(standin: Standin) -> None:
    standin.set(granularity=2 << 20)
    assert driver_granularity("cuda") == 2 << 20
    assert driver_granularity("cuda:0") == 2 << 20
    with pytest.raises(UnsupportedError, match=r"device 7.*CUDA_VISIBLE_DEVICES"):
        driver_granularity("cuda:7")
    with TransferEngine(geometry(granularity=2 << 20), driver="cuda") as engine:
        engine.self_test()


def test_no_copy_is_of_memory_that_is_not_registered(
    make_engine: MakeEngine, standin: Standin
) -> None:
    """CUDA would not refuse one, but stage it, and have the calling thread wait for it."""
    standin.set(pageable=10**9)
    engine = make_engine(chunks=1)
    stream = DriverStream(engine)
    steps(engine, 3, stream)
    engine.commit_chunk(1)
    run_step(engine, plan(4, stores=((0, 6, 1),), loads=((8, 7, 1),)), stream=stream)
    stream.synchronize()
    engine.drain()
    engine.release_chunk(1)
    engine.self_test()
    assert standin.calls("cuMemcpyBatchAsync") > 0
    assert standin.get("pageable_batches") == 0


def test_a_chunk_that_is_too_large_to_register_is_refused(
    make_engine: MakeEngine, standin: Standin
) -> None:
    """Linux 6.11 to 6.13 refuse 2 GiB and more; what there is stays."""
    engine = make_engine(chunks=1)
    standin.set(register_most=4096)
    live = standin.live()
    with pytest.raises(TransferError, match=r"cuMemHostRegister.*INVALID_VALUE"):
        engine.commit_chunk(1)
    assert standin.live() == live
    standin.set(register_most=0)
    engine.commit_chunk(1)

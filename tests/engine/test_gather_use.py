"""The gather kernel that cannot be had, fails or ends, over the stand-in; and whether it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pie_vllm.engine import link_calibration
from pie_vllm.engine.gather import (
    GatherImage,
    NoGather,
    device_arch,
    load_gather,
    use_gather,
)
from pie_vllm.engine.link_calibration import (
    GATHER_CTAS,
    UNMEASURED_CTAS,
    LinkSpeed,
    fewest_ctas,
    measure_link,
)
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import ConfigError, TransferError, UnsupportedError
from pie_vllm.geometry import Geometry
from tests.engine.driving import PAGE, geometry, plan, run_step
from tests.engine.gathering import PAGE_BYTES, SIZES, Paths, Seen, singles, write_rows
from tests.helpers.gather_kernel import IMAGE, GatherKernel, any_image
from tests.helpers.standin import Standin, load
from tests.helpers.streams import DriverStream

MakeEngine = Callable[..., TransferEngine]
pytestmark = pytest.mark.usefixtures("kernel")
ABOVE = PAGE_BYTES + 1
NO_BINARY, NOT_FOUND = 209, 500


@pytest.fixture(params=["cuda"])
def driver(driver: str) -> str:
    """Only this one."""
    return driver


@pytest.fixture
def standin(driver: str) -> Standin:
    """For tests that make no engine themselves."""
    assert driver == "cuda"
    return load()


@pytest.fixture
def engine(make_engine: MakeEngine) -> TransferEngine:
    """With room for the kernel's batches; nothing uses it yet."""
    return make_engine(**SIZES)


def launches(engine: TransferEngine, step: int = 1) -> int:
    """Launches of a step that loads the right bytes."""
    write_rows(engine)
    seen, before = Seen(engine), Paths.now()
    run_step(engine, plan(step, loads=singles()), attend=seen)
    assert seen.wrong == []
    return before.since().launches


def no_image(arch: str | None, *, ahead: bool = True) -> NoGather:
    assert (arch, ahead) == ("sm_90", True)
    return NoGather("there is no nvcc")


def but_modules() -> list[str]:
    """What is live, but for code: that stays until the context ends."""
    return [line for line in load().live() if not line.startswith("module")]


CALLS = (
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuLaunchKernel",
    "cuMemHostRegister",
    "cuMemHostGetDevicePointer",
    "cuEventCreate",
    "cuStreamSynchronize",
)


@pytest.mark.parametrize("function", CALLS)
def test_each_call_that_fails_leaves_everything_as_it_was(
    make_engine: MakeEngine, function: str
) -> None:
    """The error names it; what was there is given back, and the copy engines go on."""
    standin = load()
    standin.set(can_use_host_pointer=int(function != "cuMemHostGetDevicePointer"))
    engine = make_engine(**SIZES)
    live, calls = but_modules(), standin.calls(function)
    engine.use_gather(IMAGE, ABOVE)
    calls = standin.calls(function) - calls
    engine.use_gather(b"", 0)
    assert but_modules() == live
    assert calls > 0
    for nth in {1, calls // 2 + 1, calls}:
        standin.fail(function, nth, error=2)
        with pytest.raises(TransferError, match=f"{function}.*CUDA_ERROR_OUT_OF_MEMORY"):
            engine.use_gather(IMAGE, ABOVE)
        assert but_modules() == live
    assert launches(engine) == 0
    # Nor is a kernel that is in use let go.
    engine.use_gather(IMAGE, ABOVE)
    standin.fail(function, 1, error=2)
    with pytest.raises(TransferError, match=function):
        engine.use_gather(IMAGE, 1)
    assert launches(engine, 3) == 6


@pytest.mark.parametrize(
    "function", ["cuLaunchKernel", "cuEventRecord", "cuEventSynchronize", "cuMemcpy2DAsync"]
)
@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("inline", [True, False])
def test_a_launch_that_fails_fails_its_step(
    engine: TransferEngine, function: str, nth: int, inline: bool
) -> None:
    """Never a hang or a wrong page; after an abort the engine goes on."""
    engine.use_gather(IMAGE, ABOVE)
    stream = None if inline else DriverStream(engine)
    load().fail(function, nth, error=2)

    def steps() -> None:
        for number in range(1, 7):
            run_step(engine, plan(number, loads=singles()), stream=stream)

    with pytest.raises(TransferError, match=f"{function}.*CUDA_ERROR_OUT_OF_MEMORY"):
        steps()
    engine.abort_step()
    if stream:
        stream.synchronize()
    assert launches(engine, 9) == 6


def test_a_chunk_without_a_device_address_is_refused(make_engine: MakeEngine) -> None:
    """And not left behind."""
    load().set(can_use_host_pointer=0)
    engine = make_engine(chunks=1, **SIZES)
    live = load().live()
    load().fail("cuMemHostGetDevicePointer", error=2)
    with pytest.raises(TransferError, match="cuMemHostGetDevicePointer"):
        engine.commit_chunk(1)
    assert load().live() == live
    engine.commit_chunk(1)


def test_a_kernel_that_copies_wrong_bytes_is_refused(
    engine: TransferEngine, kernel: GatherKernel
) -> None:
    kernel.corrupt()
    with pytest.raises(TransferError, match="other bytes"):
        engine.use_gather(IMAGE, ABOVE)
    kernel.reset()
    assert launches(engine) == 0


@pytest.mark.parametrize("end", ["off", "another", "close"])
def test_its_end_waits_for_launches_in_flight(
    engine: TransferEngine, kernel: GatherKernel, end: str
) -> None:
    """The fixtures see tables that go too early, and what is left."""
    engine.use_gather(IMAGE, ABOVE)
    stream, tried = DriverStream(engine), kernel.pieces
    kernel.wait(5)
    run_step(engine, plan(1, loads=singles()), stream=stream)
    if end == "close":
        engine.close()
    else:
        engine.use_gather(IMAGE, ABOVE if end == "another" else 0)
    assert kernel.pieces - tried >= 6 * 16


@pytest.mark.parametrize("blocks", [0, 13, -1])
def test_a_grid_that_cannot_be_is_refused(engine: TransferEngine, blocks: int) -> None:
    with pytest.raises(ConfigError, match="1 to 12 blocks"):
        engine.use_gather(IMAGE, ABOVE, blocks)
    with pytest.raises(ConfigError):
        engine.use_gather(b"", ABOVE)
    with pytest.raises(ConfigError):
        engine.use_gather(IMAGE, -1)


def test_the_device_is_named(engine: TransferEngine) -> None:
    assert device_arch(engine) == "sm_90"


def test_the_host_driver_runs_no_kernels() -> None:
    with TransferEngine(geometry()) as engine:
        assert device_arch(engine) is None
        assert use_gather(engine, ABOVE, images=any_image).endswith("the device runs no kernels")
        with pytest.raises(UnsupportedError, match="no kernels"):
            engine.use_gather(IMAGE, ABOVE)


# pie_vllm.engine.gather and link_calibration.


def test_an_image_for_other_devices_is_compiled_anew(engine: TransferEngine) -> None:
    load().fail("cuModuleLoadData", error=NO_BINARY)
    found = load_gather(engine, ABOVE, images=any_image)
    assert found == GatherImage(IMAGE, "nvrtc")
    assert launches(engine) == 6
    load().fail("cuModuleLoadData", error=NO_BINARY)
    with pytest.raises(UnsupportedError, match=r"NO_BINARY_FOR_GPU.*for other GPUs"):
        engine.use_gather(IMAGE, ABOVE)


def test_the_log_says_whether_it_is_used(engine: TransferEngine) -> None:
    standin = load()
    text = use_gather(engine, 24 << 10, images=any_image)
    assert text == "gather kernel of 8 CTAs used for loads in pieces below 24 KiB"
    assert launches(engine) == 6
    engine.use_gather(b"", 0)
    assert "not measured to be faster" in use_gather(engine, 0, images=any_image)
    assert use_gather(engine, 9, images=no_image).endswith("not used: there is no nvcc")
    for function, error, text in (
        ("cuModuleGetFunction", NOT_FOUND, "cuModuleGetFunction of pie_gather"),
        ("cuMemHostRegister", 2, "cuMemHostRegister"),
    ):
        for nth in (1, 2):  # the second try has another image
            standin.fail(function, nth, error=error)
        assert text in use_gather(engine, ABOVE, images=any_image)
        standin.clear()
    assert launches(engine, 3) == 0


def measure(page: int = 4096) -> LinkSpeed:
    return measure_link(4, page, granularity=PAGE, driver="cuda", gather=any_image)


@pytest.mark.alone
def test_calibration_finds_a_kernel_that_is_faster(standin: Standin) -> None:
    """The stand-in's link holds copies and not kernels."""
    standin.link(1e8)
    found = measure()
    assert found.gather_below == 4 * 4096 + 1
    assert found.pieces[0].gather == found.load > 1.1 * found.pieces[0].load
    assert "by the gather kernel" in str(found)
    assert "worth it below 16 KiB" in str(found)


@pytest.mark.alone
def test_calibration_finds_a_kernel_that_is_slower(standin: Standin, kernel: GatherKernel) -> None:
    kernel.wait(20)
    found = measure()
    assert standin.calls("cuLaunchKernel") > 1
    assert found.gather_below == 0
    assert found.load == found.pieces[0].load > (found.pieces[0].gather or 0) > 0
    assert "not worth it" in str(found)


def test_calibration_says_why_there_is_no_kernel(standin: Standin) -> None:
    assert "fewer than 16 pages" in measure(8 << 20).no_gather
    for nth in (1, 2):
        standin.fail("cuModuleGetFunction", nth, error=NOT_FOUND)
    found = measure()
    assert "no gather kernel: cuModuleGetFunction" in str(found)
    assert (found.gather_below, found.pieces[0].gather) == (0, None)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("by_ctas", "chosen"),
    [
        ({1: 8.0, 2: 4.0, 4: 1.0, 8: 2.0}, 4),
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 1),
        ({1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}, 8),
    ],
)
def test_calibration_takes_as_few_ctas_as_do(
    standin: Standin, kernel: GatherKernel, by_ctas: dict[int, float], chosen: int
) -> None:
    """Each width is tried, and the engine that is measured goes on with the one that was chosen."""
    standin.link(1e8)
    kernel.wait_by({grid: 8.0 * times for grid, times in by_ctas.items()})
    found = measure_link(1, 4096, granularity=PAGE, driver="cuda", gather=any_image)
    assert found.gather_blocks == chosen
    assert [ctas for ctas, _ in found.by_ctas] == [1, 2, 4, 8]
    assert kernel.grid == chosen
    assert f"; {chosen} CTAs (" in str(found)
    assert standin.violations() == []


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [((10, 20, 39, 40), 4), ((39, 40, 40, 38), 1), ((1, 2, 38.7, 40), 8), ((1, 40, 30, 20), 2)],
)
def test_the_fewest_ctas_within_three_percent_are_taken(
    rates: tuple[float, ...], chosen: int
) -> None:
    assert fewest_ctas(list(zip(GATHER_CTAS, rates, strict=True))) == chosen


def test_without_a_measurement_the_kernel_has_eight_ctas() -> None:
    assert LinkSpeed((), 1.0, 1.0).gather_blocks == UNMEASURED_CTAS == 8


@pytest.mark.alone
def test_the_cost_of_submitting_bounds_a_rate(standin: Standin) -> None:
    """Single pages that the device would copy faster than a thread can ask for them."""
    standin.link(2e9)
    standin.set(submit_ns=50_000)
    found = measure_link(4, 4096, granularity=PAGE, driver="cuda", gather=None)
    assert 50e-6 <= found.submit_seconds < 1e-3
    assert found.load < 1.02 * 4096 / 50e-6
    assert found.pieces[-1].load > 3 * found.load
    assert "to submit a copy takes" in str(found)


def test_a_fast_link_is_measured_with_batches_that_last(
    standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their start is little of their time, and the kernel is tried with runs of 16 pages too."""
    standin.set(race_check=0)
    sizes = []

    def noted(geometry: Geometry, **other: Any) -> TransferEngine:
        sizes.append(geometry)
        return TransferEngine(geometry, **other)

    monkeypatch.setattr(link_calibration, "TransferEngine", noted)
    monkeypatch.setattr(link_calibration, "BATCH_SECONDS", 1.0)  # For any link here.
    monkeypatch.setattr(link_calibration, "FAST_SCRATCH_BYTES", 96 << 20)
    found = measure_link(8, 65_536, granularity=PAGE, driver="cuda", gather=any_image)
    small, large = sizes
    assert small.rows == 2 * link_calibration.BLOCKS_MAX
    assert large.rows >= 2 * 16 * 16
    assert large.device_bytes - large.ring_bytes <= 96 << 20
    assert [piece.piece_bytes // 65_536 for piece in found.pieces] == [1, 4, 16]
    assert None not in [piece.gather for piece in found.pieces]


@pytest.mark.alone
def test_a_fast_link_without_memory_is_measured_all_the_same(
    standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the small scratch."""
    standin.set(race_check=0, register_limit=64 << 20)
    monkeypatch.setattr(link_calibration, "BATCH_SECONDS", 1.0)
    found = measure_link(8, 1024, granularity=PAGE, driver="cuda", gather=None)
    assert found.load > 0


def test_code_stays_while_the_context_does(make_engine: MakeEngine) -> None:
    """Graphs that hold its kernel may live longer than the engine."""
    unloaded = load().calls("cuModuleUnload")
    engine = make_engine(**SIZES)
    engine.use_gather(IMAGE, ABOVE)
    engine.use_gather(IMAGE, ABOVE, 2)
    engine.use_gather(b"", 0)
    engine.close()
    assert load().calls("cuModuleUnload") == unloaded
    assert load().live() == []


def test_the_width_of_the_kernel_in_use_can_change(
    engine: TransferEngine, kernel: GatherKernel
) -> None:
    """Without loading it again; not to a width that cannot be."""
    with pytest.raises(ConfigError, match="an image"):
        engine.use_gather(None, ABOVE, 2)
    engine.use_gather(IMAGE, ABOVE, 8)
    loads = load().calls("cuModuleLoadData")
    engine.use_gather(None, ABOVE, 2)
    with pytest.raises(ConfigError, match="1 to 12 blocks"):
        engine.use_gather(None, ABOVE, 13)
    assert launches(engine) == 6
    assert kernel.grid == 2
    assert load().calls("cuModuleLoadData") == loads

"""Calibration finds the speed that the host driver's link is held to."""

from __future__ import annotations

from typing import ClassVar

import pytest

from pie_vllm.engine import link_calibration
from pie_vllm.engine.link_calibration import (
    SCRATCH_BYTES,
    LinkSpeed,
    PieceSpeed,
    measure_link,
    scratch_geometry,
)
from pie_vllm.engine.streams import Counters
from pie_vllm.errors import TransferError, UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.plan import StepPlan, num_copied
from tests.engine.driving import PAGE
from tests.helpers.process import resident_bytes

GRANULARITY = PAGE


def measure(
    link: float | None, layers: int = 8, page: int = 65_536, driver: str = "host"
) -> LinkSpeed:
    return measure_link(layers, page, granularity=GRANULARITY, driver=driver, link_bytes_per_s=link)


@pytest.mark.alone
@pytest.mark.parametrize("link", [2e7, 2e8])
def test_an_emulated_link_is_measured(link: float) -> None:
    """In both directions, alone and together, for every size of piece."""
    found = measure(link)
    speeds = [speed for piece in found.pieces for speed in (piece.load, piece.store)]
    for speed in [*speeds, found.load_both, found.store_both]:
        assert 0.2 * link <= speed <= 1.02 * link
    assert found.load == found.pieces[0].load


@pytest.mark.alone
def test_pieces_are_single_pages_and_longer_runs() -> None:
    """Longer runs are left out where the link takes too long for so many."""
    sizes = [piece.piece_bytes for piece in measure(None).pieces]
    assert sizes[:2] == [65_536, 4 * 65_536]
    assert sizes == sorted(set(sizes))
    assert [piece.piece_bytes for piece in measure(1e7).pieces] == [65_536]


@pytest.mark.parametrize("granularity", [PAGE, 2 << 20])
@pytest.mark.parametrize(
    ("layers", "page"), [(30, 98_304), (80, 65_536), (80, 16 << 20), (1, 64), (200, 3 << 20)]
)
def test_no_more_than_the_scratch_memory_is_taken(layers: int, page: int, granularity: int) -> None:
    """Large blocks are measured by fewer of them and fewer layers."""
    sizes = scratch_geometry(layers, page, granularity)
    assert sizes.device_bytes - sizes.ring_bytes <= SCRATCH_BYTES
    assert sizes.host_bytes <= SCRATCH_BYTES
    assert 1 <= sizes.num_layers <= layers


def test_all_memory_goes_back() -> None:
    """When the measurement is over."""
    before = resident_bytes()
    assert measure(None, layers=80, page=16 << 20).pieces[0].piece_bytes == 16 << 20
    assert resident_bytes() - before < SCRATCH_BYTES // 2


def test_the_log_names_directions_and_sizes() -> None:
    """Load and store, GB/s."""
    text = str(measure(2e8))
    assert "in pieces of 64 KiB" in text
    assert "both at once" in text
    assert "GB/s" in text


def test_an_unknown_driver_is_refused() -> None:
    """The error is the engine's."""
    with pytest.raises((UnsupportedError, TransferError)):
        measure(None, driver="none")


@pytest.mark.parametrize(
    ("by_kernel", "below", "load"),
    [
        ((None, None, None), 0, 10e9),
        ((22e9, 30e9, None), 16_385, 22e9),
        ((22e9, 21e9, None), 8_192, 22e9),
        ((11e9, 19e9, None), 8_192, 11e9),
        ((10.9e9, 40e9, None), 0, 10e9),  # within noise, and where it mattered
        ((9e9, 9e9, None), 0, 10e9),
        ((22e9, None, None), 4_097, 22e9),
    ],
)
def test_the_kernel_is_for_pieces_where_it_is_faster(
    by_kernel: tuple[float | None, ...], below: int, load: float
) -> None:
    """By 10 % or more; what a plan can count on is the faster of the two."""
    sizes, copied = (4_096, 16_384, 65_536), (10e9, 20e9, 40e9)
    pieces = [PieceSpeed(*p) for p in zip(sizes, copied, copied, by_kernel, strict=True)]
    found = LinkSpeed(tuple(pieces), 1e9, 1e9)
    assert (found.gather_below, found.load) == (below, load)
    assert ("gather" in str(found)) is (by_kernel[0] is not None)


def test_the_host_drivers_log_is_silent_about_kernels() -> None:
    """It runs none."""
    assert "gather" not in str(measure(None))


class EmulatedLink:
    """An engine in place of the real one whose copies take no time but their own clock's.

    Each batch takes ``start`` seconds and then its bytes' at ``rate``, one direction beside the
    other.
    """

    rate, start = 1.0, 0.0
    runs: ClassVar[list[float]]
    """Seconds of loads between two looks at the counters."""

    def __init__(self, sizes: Geometry, **_: object) -> None:
        self.geometry = sizes
        self.moved = {"load": Counters(0, 0, 0.0), "store": Counters(0, 0, 0.0)}

    def __enter__(self) -> EmulatedLink:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run_idle(self, plan: StepPlan) -> None:
        for direction, runs in (("load", plan.promotions), ("store", plan.stores)):
            if not len(runs):
                continue
            old, layers = self.moved[direction], self.geometry.num_layers
            size = layers * num_copied(runs) * self.geometry.page_bytes
            seconds = layers * self.start + size / self.rate
            self.moved[direction] = Counters(
                old.bytes + size, old.copies + layers * len(runs), old.seconds + seconds
            )

    def drain(self) -> None:
        self.runs.append(self.moved["load"].seconds)


@pytest.mark.parametrize("start", [5e-6, 30e-6])
@pytest.mark.parametrize("rate", [1e9, 55e9, 400e9])
def test_the_start_of_a_batch_is_little_of_its_time(
    monkeypatch: pytest.MonkeyPatch, rate: float, start: float
) -> None:
    """Whatever the link, NVLink-C2C too: within 10 %, and timed for as long as is meant."""
    monkeypatch.setattr(link_calibration, "TransferEngine", EmulatedLink)
    monkeypatch.setattr(link_calibration, "counters", lambda engine, way: engine.moved[way])
    monkeypatch.setattr(link_calibration, "device_arch", lambda _: None)
    monkeypatch.setattr(EmulatedLink, "rate", rate)
    monkeypatch.setattr(EmulatedLink, "start", start)
    monkeypatch.setattr(EmulatedLink, "runs", [], raising=False)
    found = measure_link(80, 65_536, granularity=2 << 20, driver="cuda")
    for piece in found.pieces:
        assert 0.9 * rate <= piece.load <= rate
        assert 0.9 * rate <= piece.store <= rate
    assert 0.9 * rate <= found.load_both <= rate
    # What was measured last: both directions.
    longest = EmulatedLink.runs[-1] - EmulatedLink.runs[-2]
    assert longest >= 0.9 * link_calibration.SECONDS


@pytest.mark.parametrize(
    ("submit_us", "by_kernel", "below"),
    [
        # Descriptors take 42, 10 and 2.6 % of the thread.
        (0.5, (55e9, 55e9, 55e9), 524_288),
        (0.5, (55e9, 53e9, 55e9), 131_072),
        (0.5, (53e9, 55e9, 55e9), 0),
        (0.5, (55e9, 55e9, 61e9), 1_048_577),
        # 84, 21 and 5.2 %.
        (1.0, (55e9, 55e9, 55e9), 1_048_577),
        (0.0, (55e9, 55e9, 55e9), 0),
    ],
)
def test_a_kernel_that_is_no_slower_spares_the_thread(
    submit_us: float, by_kernel: tuple[float, ...], below: int
) -> None:
    """Where descriptors would take more than 5 % of it."""
    sizes, loads = (65_536, 262_144, 1_048_576), (55e9, 55e9, 55e9)
    pieces = [PieceSpeed(*p) for p in zip(sizes, loads, loads, by_kernel, strict=True)]
    found = LinkSpeed(tuple(pieces), 1e9, 1e9, submit_seconds=submit_us * 1e-6)
    assert found.gather_below == below

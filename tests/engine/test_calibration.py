"""Calibration finds the speed that the host driver's link is held to."""

from __future__ import annotations

import pytest

from pie_vllm.engine.link_calibration import (
    SCRATCH_BYTES,
    LinkSpeed,
    PieceSpeed,
    measure_link,
    scratch_geometry,
)
from pie_vllm.errors import TransferError, UnsupportedError
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

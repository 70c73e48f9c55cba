"""Sizing: every byte accounted for, every boundary aligned."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.errors import ConfigError
from pie_vllm.geometry import RING_FRACTION_MAX
from pie_vllm.sizing import (
    BYTES_MAX,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    MIN_RESIDENT_BLOCKS,
    blocks_fed,
    chunk_target,
    plan_geometry,
)
from tests.helpers.sizes import SIZES, plan


@st.composite
def settings(draw: st.DrawFn) -> dict[str, object]:
    layers = draw(st.integers(1, 80))
    page = draw(st.integers(1, 300_000))
    return {
        "num_layers": layers,
        "page_bytes": page,
        "device_bytes": draw(st.integers(5, 4000)) * layers * page + draw(st.integers(0, 1 << 26)),
        "pool_bytes": draw(st.integers(1, 8000)) * layers * page,
        "granularity": draw(st.sampled_from([4096, 2 << 20])),
        "needed_blocks": draw(st.integers(1, 6000)),
        "ring_slots": draw(st.one_of(st.none(), st.integers(1, layers))),
        "ring_fraction": draw(st.one_of(st.none(), st.floats(0.001, 0.9))),
        "fed_blocks": draw(st.one_of(st.none(), st.integers(1, 9000))),
        "extra_regions": draw(st.one_of(st.just(0), st.integers(1, 80))),
        "draft_layers": draw(st.one_of(st.just(0), st.integers(1, 40))),
    }


@given(settings())
def test_planned_sizes_fit_and_align(arguments: dict[str, object]) -> None:
    """A plan stays within device and pool bytes and aligns every layer's boundary."""
    try:
        g = plan_geometry(**arguments)  # type: ignore[arg-type]
    except ConfigError:
        return
    assert g.device_bytes <= arguments["device_bytes"]  # type: ignore[operator]
    assert g.host_bytes <= arguments["pool_bytes"]  # type: ignore[operator]
    assert 1 <= g.pooled_blocks <= g.rows
    assert g.resident_blocks >= MIN_RESIDENT_BLOCKS
    assert g.num_blocks >= arguments["needed_blocks"] + 1  # type: ignore[operator]
    for layer in {0, g.num_layers // 2, g.num_layers - 1, g.num_regions - 1}:
        assert g.page_offset(layer, g.resident_blocks) % g.granularity == 0
        assert g.page_offset(layer, 0) >= layer * g.layer_stride
        end = g.page_offset(layer, g.num_blocks)
        assert end <= (layer + 1) * g.layer_stride
    assert g.layer_stride % g.granularity == 0
    added = arguments["extra_regions"] + arguments["draft_layers"]  # type: ignore[operator]
    assert g.num_regions == g.num_layers + added
    assert g.virtual_bytes == g.num_regions * g.layer_stride
    design_bound = (
        g.num_regions * g.resident_blocks * g.page_bytes
        + (g.ring_slots + g.draft_layers) * g.pooled_blocks * g.page_bytes
        + 2 * (g.num_regions + g.ring_slots + g.draft_layers) * g.granularity
    )
    assert g.device_bytes <= design_bound


def test_the_ring_keeps_to_its_fraction() -> None:
    """The ring takes at most its share while one longest request fits anyway."""
    g = plan(ring_fraction=0.05)
    assert g.ring_bytes <= 0.05 * SIZES["device_bytes"] + g.ring_slots * g.granularity
    assert g.pooled_blocks < g.rows
    assert g.idle_cost_blocks == pytest.approx(g.ring_bytes / g.row_bytes)


def test_ring_and_draft_pages_keep_to_their_fraction() -> None:
    """A draft model as deep as the model leaves a narrower window, and both fit the device."""
    model = plan(ring_fraction=0.1, draft_layers=30)
    assert model.ring_bytes + model.draft_bytes <= 0.1 * SIZES["device_bytes"] + 33 * 4096
    assert model.pooled_blocks < plan(ring_fraction=0.1).pooled_blocks


def test_a_ring_that_follows_the_link_is_as_wide_as_the_link_can_feed() -> None:
    """Up to a share of the device, and unless a share was asked for."""
    widths = [plan(fed_blocks=blocks).pooled_blocks for blocks in (1, 10, 40, 1000)]
    assert widths[:3] == [1, 10, 40]
    assert 40 < widths[3] == plan().pooled_blocks
    assert plan().ring_bytes <= RING_FRACTION_MAX * SIZES["device_bytes"] + 3 * 4096
    assert plan(ring_fraction=0.05, fed_blocks=1) == plan(ring_fraction=0.05)


def test_a_longest_request_widens_the_window_no_further_than_needed() -> None:
    """Where the fraction gives too few blocks, W grows to the least that suffices."""
    g = plan(needed_blocks=100)
    assert g.num_blocks >= 101
    smaller = plan(needed_blocks=99)
    assert smaller.pooled_blocks <= g.pooled_blocks
    assert g.num_blocks <= 101 + g.num_layers // g.ring_slots


def test_rows_and_window_are_two_numbers() -> None:
    """A larger pool gives more rows; the ring still caps the window."""
    small, large = plan(ring_fraction=0.05), plan(ring_fraction=0.05, pool_bytes=1 << 34)
    assert large.rows > small.rows
    assert large.pooled_blocks == small.pooled_blocks


def test_no_run_of_rows_can_leave_the_pool() -> None:
    """Chunks hold whole rows and cover all of them."""
    g = plan(chunk_bytes=5 * 30 * 98_304 + 17)
    assert g.chunk_rows == 5
    assert g.num_chunks == 16


GIB = 1 << 30


@pytest.mark.parametrize(
    ("pool", "layers", "link", "target"),
    [
        (8 * GIB, 32, None, CHUNK_BYTES_MIN),
        (80 * GIB, 32, 55e9, CHUNK_BYTES_MIN),
        (GIB, 80, 377e9, CHUNK_BYTES_MIN),
        (4 * GIB, 80, 377e9, 4 * GIB // 16),
        (54 * GIB, 80, 377e9, 80 * 9_425_000),
        (900 * GIB, 126, 377e9, CHUNK_BYTES_MAX),
        (1024 * GIB, 32, 55e9, 1024 * GIB // 4096),
    ],
)
def test_chunks_follow_the_link_and_the_pool(
    pool: int, layers: int, link: float | None, target: int
) -> None:
    """A fast link's copies are as long as it wants, a small pool has several chunks all the same.

    A large pool has no more of them than a driver registers.
    """
    assert chunk_target(pool, layers, link) == target
    row = layers * 65536
    g = plan(
        num_layers=layers, page_bytes=65536, pool_bytes=pool, device_bytes=GIB * layers,
        link_bytes_per_s=link,
    )  # fmt: skip
    assert g.chunk_rows * row <= target < g.chunk_rows * row + 32 * row
    if link == 377e9 and pool > 50 * GIB:
        assert g.chunk_rows * g.page_bytes >= 8 << 20
        assert g.chunk_rows % 32 == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ring_slots": 31}, ['ring_slots"] 31', "30 attention"]),
        ({"pool_bytes": 100}, ["--pie-pool-gib", "100 bytes", "2949120"]),
        ({"device_bytes": 3 * 30 * 98_304}, ["too small", "--kv-cache-memory-bytes"]),
        ({"needed_blocks": 1000}, ["--max-model-len", "1001 blocks", "--pie-pool-gib"]),
    ],
)
def test_impossible_sizes_say_what_would_work(changes: dict[str, int], words: list[str]) -> None:
    """Each refusal names the flag, the value found and the way out."""
    with pytest.raises(ConfigError) as caught:
        plan(**changes)
    for word in words:
        assert word in str(caught.value)


EXTREMES = (0, -1, 1, 2, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 + 3, 10**400)


@pytest.mark.fuzz
def test_sizes_of_any_magnitude_are_planned_or_refused(fuzz_seeds: range) -> None:
    """Nothing but a ConfigError comes out, and what is planned fits the native engine's 64 bits."""
    planned = 0
    for seed in fuzz_seeds:
        draw = random.Random(seed)
        for _ in range(20):
            changes: dict[str, object] = {
                name: draw.choice(EXTREMES)
                if draw.random() < 0.7
                else draw.randrange(1, 1 << draw.randrange(1, 70))
                for name in draw.sample(sorted(SIZES), draw.randint(1, 3))
            }
            if draw.random() < 0.3:
                changes["ring_fraction"] = draw.choice([0.0, -1.0, 1.0, math.nan, math.inf, 0.5])
            if draw.random() < 0.3:
                changes["ring_slots"] = draw.choice(EXTREMES)
            if draw.random() < 0.3:
                changes["fed_blocks"] = draw.choice(EXTREMES)
            try:
                g = plan(**changes)
            except ConfigError:
                continue
            planned += 1
            wanted = {**SIZES, **changes}
            assert g.device_bytes <= wanted["device_bytes"]  # type: ignore[operator]
            assert g.host_bytes <= wanted["pool_bytes"]  # type: ignore[operator]
            assert g.num_blocks > wanted["needed_blocks"]  # type: ignore[operator]
            assert 1 <= g.pooled_blocks <= g.rows
            assert max(g.virtual_bytes, g.device_bytes, g.host_bytes) <= BYTES_MAX
    assert planned > len(fuzz_seeds)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, ["attention layers", "cannot be 0", "1 to"]),
        ({"page_bytes": 0}, ["KV page", "cannot be 0"]),
        ({"pool_bytes": 2**63}, ["--pie-pool-gib", str(2**63), "0 to"]),
        ({"device_bytes": 10**400}, ["--kv-cache-memory-bytes"]),
        ({"granularity": 0}, ["granularity", "cannot be 0"]),
        ({"ring_fraction": math.nan}, ['ring_fraction"] nan', "above 0 and below 1"]),
        ({"fed_blocks": -1}, ["cannot feed -1 blocks"]),
        (
            {"pool_bytes": BYTES_MAX, "device_bytes": BYTES_MAX, "ring_fraction": 0.9},
            ["bytes of addresses", "--pie-pool-gib"],
        ),
    ],
)
def test_sizes_that_no_machine_has_say_so(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**changes)
    for word in words:
        assert word in str(caught.value)


def test_what_a_link_feeds() -> None:
    """1 GB/s and steps of 50 ms: one step's loads, rounded up; never nothing."""
    assert blocks_fed(1e9, 0.05, 1_000_000) == 50
    assert blocks_fed(1e9, 0.05, 3_000_000) == 17
    assert blocks_fed(1.0, 1e-6, 1 << 40) == 1

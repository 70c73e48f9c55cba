"""Geometry: what each further layer and region takes, in all sizes."""

from __future__ import annotations

import pytest

from pie_vllm.errors import ConfigError
from tests.helpers.sizes import SIZES, plan


def test_draft_layers_take_device_pages_of_all_blocks() -> None:
    """A head of one layer costs a page of each pooled block, a page of each row, and no load."""
    plain, head = plan(), plan(draft_layers=1)
    page = plain.page_bytes
    assert (plain.draft_bytes, plain.load_bytes) == (0, plain.row_bytes)
    assert head.row_bytes == plain.row_bytes + page == 31 * page
    assert head.load_bytes == plain.load_bytes == 30 * page
    assert head.rows == SIZES["pool_bytes"] // (31 * page)
    assert head.host_bytes == head.rows * 31 * page
    assert (head.num_regions, head.extra_regions) == (31, 0)
    assert head.block_bytes == 31 * page
    assert head.draft_bytes == head.slot_bytes == head.ring_bytes // head.ring_slots
    taken = head.ring_bytes + head.draft_bytes
    assert head.device_bytes == 31 * head.layer_resident_bytes + taken <= SIZES["device_bytes"]
    assert head.idle_cost_blocks == pytest.approx(taken / (31 * page))
    assert head.resident_blocks < plain.resident_blocks
    with pytest.raises(ConfigError, match=r"number of draft layers .* cannot be -1"):
        plan(draft_layers=-1)


def test_regions_without_a_pool_take_resident_pages_only() -> None:
    """They cost a block a page each; ring, window and rows are those of the layers with a pool."""
    plain, wide = plan(), plan(extra_regions=30)
    assert plain.extra_regions == 0
    assert plain.block_bytes == plain.row_bytes
    assert wide.block_bytes == 2 * plain.block_bytes == 60 * 98_304
    assert wide.row_bytes == plain.row_bytes
    ring = ("pooled_blocks", "ring_slots", "ring_bytes", "rows", "chunk_rows", "host_bytes")
    assert [getattr(wide, name) for name in ring] == [getattr(plain, name) for name in ring]
    left = SIZES["device_bytes"] - plain.ring_bytes
    assert plain.resident_blocks == left // (30 * 98_304)
    assert wide.resident_blocks == left // (60 * 98_304)
    assert wide.idle_cost_blocks == pytest.approx(wide.ring_bytes / (60 * 98_304))
    assert wide.capacity_gained_blocks == wide.num_blocks - wide.device_bytes // (60 * 98_304)
    assert wide.device_bytes == 60 * wide.layer_resident_bytes + wide.ring_bytes
    assert wide.virtual_bytes == 60 * wide.layer_stride
    with pytest.raises(ConfigError, match="regions without a pool cannot be -1"):
        plan(extra_regions=-1)

"""The modes of the core tests: how many blocks of each tier a test gets that asks for N.

PIE_CORE names a mode; R resident and W pooled blocks:

=======  =========================================================================================
stock    nothing is replaced
idle     R = N, W = 0, parking off, nothing kept back: as stock, block ids included
idlecap  as idle, with what waiting requests leave to prompts under way
parked   R = N, W = 0, rows for parking: differs only where stock would have evicted a prefix
room     R = N, W = N more: the pool is there and not needed
forced   as room; before each step every block that can be is demoted, and as many pages are taken
         out of circulation as pooled ids are in use: other ids, the capacity of stock
churn    as forced, and every step promotes again what it can
half     R = N/2, W = N - R
tiny     R = N/8, at least 8 and at most 24, W = N - R
=======  =========================================================================================
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from pie_vllm.geometry import Geometry

MODE = os.environ.get("PIE_CORE", "stock")
FORCED = MODE in ("forced", "churn")
LIFT = FORCED or MODE in ("idle", "parked", "room")
"""Whether waiting requests leave nothing to prompts under way."""

PARKING = None if MODE in ("idle", "idlecap") else "lru"


def sizes(num_blocks: int) -> tuple[int, int]:
    """Resident and pooled blocks for a test that asks for so many."""
    if MODE in ("idle", "idlecap", "parked"):
        return num_blocks, 0
    if MODE in ("room", "forced", "churn"):
        return num_blocks, num_blocks
    wanted = max(4, num_blocks // 2) if MODE == "half" else min(24, max(8, num_blocks // 8))
    residents = min(wanted, num_blocks)
    return residents, num_blocks - residents


def geometry(num_blocks: int) -> Geometry:
    """Sizes for a test that asks for so many blocks; there are no bytes behind them."""
    residents, pooled = sizes(num_blocks)
    special = {"idle": 0, "idlecap": 0, "parked": max(64, residents)}
    rows = special.get(MODE, 2 * pooled)
    return Geometry(
        num_layers=4,
        page_bytes=4096,
        resident_blocks=residents,
        pooled_blocks=pooled,
        ring_slots=2,
        rows=rows,
        chunk_rows=max(1, rows),  # One chunk: no worker reports what it holds.
        granularity=4096,
    )


def resized(config: Any) -> Any:
    """A KVCacheConfig with the blocks of both tiers."""
    blocks = sum(sizes(config.num_blocks))
    return config if blocks == config.num_blocks else replace(config, num_blocks=blocks)

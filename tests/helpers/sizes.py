"""Sizes of a small model on a small device, from which tests plan a geometry."""

from __future__ import annotations

from pie_vllm.geometry import Geometry
from pie_vllm.sizing import plan_geometry

SIZES = {
    "num_layers": 30,
    "page_bytes": 98_304,
    "device_bytes": 40 * 30 * 98_304,
    "pool_bytes": 80 * 30 * 98_304,
    "granularity": 4096,
    "needed_blocks": 16,
}


def plan(**changes: object) -> Geometry:
    """The geometry of ``SIZES`` with these changes."""
    return plan_geometry(**{**SIZES, **changes})  # type: ignore[arg-type]

"""The window follows link and step time."""

from __future__ import annotations

from pie_vllm.policy.window import blocks_fed


def test_what_a_link_feeds() -> None:
    """1 GB/s and steps of 50 ms: two steps' loads, rounded up; never nothing."""
    assert blocks_fed(1e9, 0.05, 1_000_000) == 100
    assert blocks_fed(1e9, 0.05, 3_000_000) == 34
    assert blocks_fed(1.0, 1e-6, 1 << 40) == 1

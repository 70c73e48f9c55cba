"""The window follows link and step time."""

from __future__ import annotations

from pie_vllm.policy.window import blocks_fed


def test_what_a_link_feeds() -> None:
    """1 GB/s and steps of 50 ms: one step's loads, rounded up; never nothing."""
    assert blocks_fed(1e9, 0.05, 1_000_000) == 50
    assert blocks_fed(1e9, 0.05, 3_000_000) == 17
    assert blocks_fed(1.0, 1e-6, 1 << 40) == 1

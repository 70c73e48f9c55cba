"""What is measured of the link at start decides how wide the ring is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, tokens

SLOW, FAST = 0.005, 2.0
"""GB/s."""

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.alone]


def test_the_ring_is_as_wide_as_the_link_can_feed(engines: Engines, model: Path) -> None:
    """A slow link gets a narrow ring, a fast one a wider one; both answer as stock does."""
    sizes = Setup(model, 30, 40, 90, dtype="float32", ring="auto", target=0.01)
    load = [request(text, max_tokens=24) for text in chats(12, 14, 6)]
    narrow, stock = engines.both(replace(sizes, emulated_link_gbps=SLOW), [round_(load)], sizes)
    wide = engines.run(replace(sizes, emulated_link_gbps=FAST), [round_(load)])
    slow, fast = narrow[0]["counters"], wide[0]["counters"]
    assert fast["pooled_blocks"] > 2 * slow["pooled_blocks"]
    assert fast["resident_blocks"] < slow["resident_blocks"]
    assert fast["bytes_loaded"] > 0
    assert tokens(narrow[0]) == tokens(wide[0]) == tokens(stock[0])

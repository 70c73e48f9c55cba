"""How much parked KV comes back in one step while others run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pie_vllm.policy.restoring import restored_at_once


@pytest.mark.parametrize(
    ("most", "loads", "expected"),
    [
        (100, 0, 100),
        (100, 60, 40),
        (100, 90, 25),
        (100, 500, 25),
        (3, 3, 1),
        (0, 0, 1),
        (None, 500, 64),
    ],
)
def test_what_pooled_blocks_leave_of_the_link(most: int | None, loads: int, expected: int) -> None:
    """A quarter of it at least, and one block; without a target, all there is room for."""
    residency: Any = SimpleNamespace(reading=SimpleNamespace(num_blocks=loads), boundary=64)
    assert restored_at_once(residency, most) == expected

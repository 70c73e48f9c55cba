"""Row room: which parked KV gives its rows to other KV."""

from __future__ import annotations

import pytest

from pie_vllm.policy.pool import extents
from tests.helpers.parked_steps import block, parking_of


def test_an_extent_is_evicted_whole_unless_a_step_reads_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what comes next lies together too; else what is spare is used."""
    monkeypatch.setattr(extents, "EXTENTS_MIN", 2)
    rows, parking = parking_of(8)
    for index in range(8):
        parking.places[index] = extents.CHAIN + index
        assert parking.keep(block(index, f"k{index}"))
    parking.take()
    parking.places[20], parking.places[21] = 2 * extents.CHAIN, 3 * extents.CHAIN
    assert parking.keep(block(20, "new"))
    assert [parking.parked(f"k{index}") for index in range(8)] == [False] * 4 + [True] * 4
    assert rows.num_free == 3
    parking.take()
    parking.pin(["k5", "new"])
    assert parking.keep(block(21, "other"))
    assert all(parking.parked(f"k{index}") for index in range(4, 8))
    assert rows.num_free == 2
    parking.check_integrity()

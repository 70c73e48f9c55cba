"""Row sources: whether a row holds the KV of this very block, or of another one of its key."""

from __future__ import annotations

import pytest

from tests.helpers.parked_steps import block, parking_of


@pytest.mark.parametrize("distinct", [True, False])
def test_a_block_that_differs_from_another_of_its_key_gets_a_row_of_its_own(distinct: bool) -> None:
    """The last block of a hit that a head's request computed again: another token is behind it."""
    _, parking = parking_of(8, distinct=distinct)
    parking.evicted(["x"], [1])
    assert parking.row_for(block(2, "x"), 10, 0)[1] is not distinct
    assert parking.parked("x") is distinct
    parking.check_integrity()


def test_a_block_has_the_row_that_it_was_stored_to_or_filled_from() -> None:
    """Ahead of its demotion, by its restoring and by its promotion, until it has left its page."""
    rows, parking = parking_of(8, distinct=True)
    assert parking.keep(block(1, "x"))
    parking.take()
    assert parking.row_for(block(1, "x"), 10, 0)[1]
    parking.promoted([block(10, "x")], [4])
    parking.take()
    assert not parking.row_for(block(5, "x"), 11, 0)[1]
    assert parking.row_for(block(4, "x"), 12, 0)[1]
    parking.left_row(block(12, "x"))
    parking.restore(parking.pin(["x"]), [6])
    parking.take()
    assert parking.row_for(block(6, "x"), 13, 0)[1]
    assert parking.keep(block(7, "y"))
    parking.take()
    parking.evicted(["y"], [7])
    assert not parking.row_for(block(7, "y"), 14, 0)[1], "another request has computed it there"
    assert rows.num_parked == 1
    parking.check_integrity()

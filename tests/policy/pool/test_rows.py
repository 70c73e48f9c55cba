"""RowLedger: no row has two owners, none is lost."""

from __future__ import annotations

import random

import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.rows import RowLedger


@pytest.mark.parametrize("rows", [1, 7, 64, 90])
def test_random_takes_and_releases_keep_the_books(rows: int) -> None:
    """After any sequence every row is free or has exactly one owner."""
    rng = random.Random(rows)
    ledger = RowLedger(rows, first_block=100, chunk_rows=5)
    owners: dict[int, int] = {}
    for _ in range(2000):
        if rng.random() < 0.1:
            ledger.usable = min(rows, 5 * rng.randint(max(ledger.chunks_held, 1), rows))
        if owners and (rng.random() < 0.5 or len(owners) == ledger.usable):
            block = rng.choice(list(owners))
            assert ledger.release(block) == owners.pop(block)
        else:
            block = rng.choice([b for b in range(100, 100 + 2 * rows) if b not in owners])
            row = ledger.take(block)
            assert row not in owners.values()
            assert row < ledger.usable
            owners[block] = row
        assert ledger.num_free == rows - len(owners)
        assert ledger.chunks_held == max(owners.values(), default=-5) // 5 + 1
    ledger.check_integrity()


def test_parked_rows_stay_taken_and_go_from_id_to_id() -> None:
    """A row is parked when its id goes, adopted by another id, or free again; it counts as held."""
    ledger = RowLedger(4, first_block=10, chunk_rows=2)
    assert [ledger.take(10), ledger.take(11)] == [0, 1]
    assert ledger.park(11) == 1
    assert not ledger.holds(11)
    assert ledger.num_parked == 1
    assert [ledger.take_parked(), ledger.take_parked()] == [2, 3]
    assert not ledger.has_free
    assert ledger.take_parked() is None
    with pytest.raises(IntegrityError, match="no free row"):
        ledger.take(12)
    ledger.adopt(13, 1)
    assert ledger.row_of(13) == 1
    with pytest.raises(IntegrityError, match="not parked"):
        ledger.adopt(14, 1)
    with pytest.raises(IntegrityError, match="not parked"):
        ledger.free_parked(0)
    assert ledger.chunks_held == 2
    ledger.free_parked(2)
    ledger.free_parked(3)
    assert ledger.chunks_held == 1
    assert ledger.num_free == 2
    ledger.usable = 2
    assert not ledger.has_free
    ledger.check_integrity()


def test_neighbouring_ids_get_neighbouring_rows() -> None:
    """Ids handed out in order get one run of rows, so that they are one copy."""
    ledger = RowLedger(16, first_block=8)
    assert [ledger.take(block) for block in range(8, 16)] == list(range(8))


def test_a_full_pool_says_so() -> None:
    """The window may not be larger than the rows."""
    ledger = RowLedger(1, first_block=0)
    ledger.take(0)
    with pytest.raises(IntegrityError):
        ledger.take(1)


def test_rows_that_may_not_be_used_are_not_handed_out() -> None:
    """Not by preference, not as neighbours, and afterwards they are."""
    ledger = RowLedger(8, first_block=0, chunk_rows=2)
    ledger.usable = 4
    assert sorted(ledger.take(block) for block in (3, 4, 7, 6)) == [0, 1, 2, 3]
    with pytest.raises(IntegrityError, match="no free row"):
        ledger.take(1)
    ledger.usable = 8
    assert ledger.take(1) >= 4
    ledger.check_integrity()

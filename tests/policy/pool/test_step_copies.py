"""StepCopies: what a step stores and restores, and rows that last until it is planned."""

from __future__ import annotations

from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies


def test_copies_are_taken_once_and_rows_that_leave_are_free_then() -> None:
    """A row that the step restores from is not handed out before."""
    rows = RowLedger(2, 10)
    copies = StepCopies(rows)
    assert not copies.pending
    first, second = rows.take_parked(), rows.take_parked()
    assert (first, second) == (0, 1)
    copies.restores[5] = 0
    copies.leaving.add(0)
    copies.stores[1] = 6
    assert rows.take_parked() is None
    assert copies.pending
    assert copies.take() == ([(6, 1)], [(5, 0)])
    assert rows.take_parked() == 0
    assert not copies.pending
    assert copies.take() == ([], [])


def test_a_row_that_is_free_at_once_gets_no_store() -> None:
    """What was to be stored there is not."""
    rows = RowLedger(1, 10)
    copies = StepCopies(rows)
    row = rows.take_parked()
    assert row == 0
    copies.stores[row] = 6
    copies.free(row)
    assert copies.take() == ([], [])
    assert rows.num_parked == 0

"""RunSet: always the fewest runs, whatever the order of changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.errors import IntegrityError
from pie_vllm.plan import Copy
from pie_vllm.policy.placement.run_set import RunSet, merge


@given(st.lists(st.integers(0, 40), max_size=120), st.integers(1, 9), st.integers(-3, 3))
def test_changes_one_by_one_equal_merging_all(
    touches: list[int], chunk_rows: int, skew: int
) -> None:
    """Adding and removing in any order gives the runs that merging from scratch gives."""
    runs = RunSet(chunk_rows)
    blocks: dict[int, int] = {}
    for block in touches:
        if block in blocks:
            del blocks[block]
            runs.remove(block)
        else:
            row = block + 10 + (skew if block % 5 == 0 else 0)
            if row in blocks.values():
                continue
            blocks[block] = row
            runs.add(block, row)
        runs.check_integrity()
        assert runs.runs() == merge(blocks.items(), chunk_rows)
        assert len(runs) == len(blocks)


def test_runs_do_not_cross_a_chunk() -> None:
    """Neighbours in two chunks of the pool are two runs."""
    assert merge([(10, 6), (11, 7), (12, 8)], 8) == (Copy(10, 6, 2), Copy(12, 8, 1))


def test_unchanged_runs_are_the_same_object() -> None:
    """Without a change nothing is built anew; that is how a plan says 'as before'."""
    runs = RunSet(8)
    runs.add(3, 0)
    assert runs.runs() is runs.runs()


def test_a_block_cannot_be_added_twice() -> None:
    """Adding a block that is there is a bug of the caller."""
    runs = RunSet(8)
    runs.add(3, 0)
    with pytest.raises(IntegrityError):
        runs.add(3, 1)

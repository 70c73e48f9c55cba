"""RunSet: always the fewest runs, whatever the order of changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.errors import IntegrityError
from pie_vllm.plan import NO_RUNS, Copy, Runs
from pie_vllm.plan import runs as array
from pie_vllm.policy.placement.run_set import FEW, RunSet, merge

RANGE = 41


def merged_one_by_one(rows: dict[int, int], chunk_rows: int) -> Runs:
    """The fewest runs, by the rule and one block at a time."""
    found: list[Copy] = []
    for block, row in sorted(rows.items()):
        if found:
            last = found[-1]
            follows = block == last.block + last.count and row == last.row + last.count
            if follows and row % chunk_rows:
                found[-1] = last._replace(count=last.count + 1)
                continue
        found.append(Copy(block, row, 1))
    return array(found)


def row_for(block: int, skew: int) -> int:
    """Mostly neighbours' rows, each fifth one elsewhere."""
    return block + 10 + (skew if block % 5 == 0 else 0)


@given(st.lists(st.integers(0, RANGE - 1), max_size=120), st.integers(1, 9), st.integers(-3, 3))
def test_changes_one_by_one_equal_merging_all(
    touches: list[int], chunk_rows: int, skew: int
) -> None:
    """Adding and removing in any order gives the runs that merging from scratch gives."""
    runs = RunSet(0, RANGE, chunk_rows)
    blocks: dict[int, int] = {}
    for block in touches:
        if block in blocks:
            del blocks[block]
            runs.remove(block)
        else:
            row = row_for(block, skew)
            if row in blocks.values():
                continue
            blocks[block] = row
            runs.place(block, row)
            runs.add(block)
        runs.check_integrity()
        assert np.array_equal(runs.runs(), merged_one_by_one(blocks, chunk_rows))
        assert len(runs) == len(blocks)


CHANGES = st.lists(
    st.one_of(
        st.integers(0, RANGE - 1),
        st.dictionaries(st.integers(0, RANGE - 1), st.booleans(), max_size=RANGE),
    ),
    max_size=40,
)


@given(CHANGES, st.integers(1, 9), st.integers(-3, 3), st.integers(0, 100))
def test_many_at_once_equal_merging_all(
    changes: list[int | dict[int, bool]], chunk_rows: int, skew: int, first: int
) -> None:
    """One by one and many at once may follow each other; rows move while a block is outside."""
    runs = RunSet(first, RANGE, chunk_rows)
    blocks: dict[int, int] = {}
    for number, change in enumerate(changes):
        if isinstance(change, int):
            block = first + change
            if blocks.pop(block, None) is None:
                blocks[block] = row_for(block, skew + number)
                runs.place(block, blocks[block])
                runs.add(block)
            else:
                runs.remove(block)
        else:
            named = {first + block: inside for block, inside in change.items()}
            rows = [blocks.get(block, row_for(block, skew + number)) for block in named]
            inside = np.fromiter(named.values(), np.bool_, len(named))
            ids = np.fromiter(named, np.int64, len(named))
            if number % 2:
                runs.place_all(ids, np.array(rows, np.int64))
            else:
                for block, row in zip(named, rows, strict=True):
                    runs.place(block, row)
            runs.change(ids, inside)
            for block, row in zip(named, rows, strict=True):
                blocks.pop(block, None)
                if named[block]:
                    blocks[block] = row
        runs.check_integrity()
        wanted = merged_one_by_one(blocks, chunk_rows)
        assert np.array_equal(runs.runs(), wanted)
        assert np.array_equal(merge([*blocks.items()], chunk_rows), wanted)
        assert len(runs) == len(blocks)


@pytest.mark.parametrize("size", [1, 2, FEW - 1, FEW, FEW + 1, 1000])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 5000])
def test_many_pairs_merge_as_few_do(size: int, chunk_rows: int) -> None:
    """Long runs and single blocks, given in any order."""
    rng = random.Random(size * chunk_rows)
    rows, block, row = {}, 5, 0
    while len(rows) < size:
        block += rng.choice([1, 1, 1, 2])
        row += rng.choice([1, 1, 1, 3])
        rows[block] = row
    pairs = [*rows.items()]
    rng.shuffle(pairs)
    assert np.array_equal(merge(pairs, chunk_rows), merged_one_by_one(rows, chunk_rows))


def test_runs_do_not_cross_a_chunk() -> None:
    """Neighbours in two chunks of the pool are two runs."""
    wanted = array([Copy(10, 6, 2), Copy(12, 8, 1)])
    assert np.array_equal(merge([(12, 8), (10, 6), (11, 7)], 8), wanted)
    runs = RunSet(10, 3, 8)
    for block in (12, 10, 11):
        runs.place(block, block - 4)
        runs.add(block)
    assert np.array_equal(runs.runs(), wanted)


def test_nothing_is_no_runs() -> None:
    """A plan without copies has arrays, too."""
    assert merge([], 8) is NO_RUNS
    runs = RunSet(3, 2, 8)
    runs.add(4)
    runs.remove(4)
    assert runs.runs().shape == (0, 3)


def test_unchanged_runs_are_the_same_object() -> None:
    """Without a change nothing is built anew; that is how a plan says 'as before'."""
    runs = RunSet(3, 1, 8)
    runs.add(3)
    assert runs.runs() is runs.runs()


def test_what_was_handed_out_does_not_change() -> None:
    """A plan in flight keeps its runs, and nobody can write to them."""
    runs = RunSet(3, 4, 8)
    runs.add(3)
    sent = runs.runs()
    runs.place(4, 1)
    runs.add(4)
    assert sent.tolist() == [[3, 0, 1]]
    assert runs.runs().tolist() == [[3, 0, 2]]
    for found in (sent, merge([(3, 0)], 8)):
        with pytest.raises(ValueError, match="read-only"):
            found[0, 1] = 7


def test_a_block_cannot_be_added_or_removed_twice() -> None:
    """Adding a block that is there is a bug of the caller; so is removing one that is not."""
    runs = RunSet(3, 1, 8)
    runs.add(3)
    with pytest.raises(IntegrityError):
        runs.add(3)
    runs.remove(3)
    with pytest.raises(IntegrityError):
        runs.remove(3)


def test_the_row_of_a_block_in_the_set_does_not_change() -> None:
    """Its KV is where it is; naming the same row again is what a second reader does."""
    runs = RunSet(3, 1, 8)
    runs.place(3, 4)
    runs.add(3)
    runs.place(3, 4)
    with pytest.raises(IntegrityError, match="has row 4"):
        runs.place(3, 5)
    with pytest.raises(IntegrityError, match=r"\[3\] in the run set have other rows"):
        runs.place_all(np.array([3]), np.array([5]))

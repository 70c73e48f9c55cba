"""ReadSet: exactly the pooled blocks of the scheduled requests, sent only when they change."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.plan import NO_RUNS, Runs
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.placement.run_set import merge
from pie_vllm.policy.pool.rows import RowLedger

FIRST = 10
ROWS = 24
REQUESTS = "abcde"
CHUNK_ROWS = 8


def make() -> tuple[ReadSet, RowLedger]:
    rows = RowLedger(ROWS, FIRST)
    for block in range(FIRST, FIRST + ROWS):
        rows.take(block)
    return ReadSet(rows, FIRST, ROWS, CHUNK_ROWS), rows


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["add", "many", "discard", "fewer", "forget", "follow", "follow", "take"]
            ),
            st.sampled_from(REQUESTS),
            st.integers(FIRST, FIRST + ROWS - 1),
            st.sets(st.sampled_from(REQUESTS)),
        ),
        max_size=120,
    )
)
def test_loads_are_the_union_over_scheduled_requests(
    operations: list[tuple[str, str, int, set[str]]],
) -> None:
    """Whatever is added, discarded, forgotten and left out, shared blocks load once."""
    reading, rows = make()
    pooled: dict[str, set[int]] = {}
    scheduled: set[str] = set()
    sent = NO_RUNS
    for kind, request_id, block, names in operations:
        if kind == "add":
            reading.add(request_id, block)
            pooled.setdefault(request_id, set()).add(block)
        elif kind == "many":
            blocks = range(block, min(block + 9, FIRST + ROWS))
            reading.add_all(request_id, blocks)
            pooled.setdefault(request_id, set()).update(blocks)
        elif kind == "discard" and block in pooled.get(request_id, ()):
            reading.discard(request_id, block)
            pooled[request_id].remove(block)
        elif kind == "fewer" and pooled.get(request_id):
            gone = [b for b in pooled[request_id] if b <= block]
            reading.discard_all(request_id, gone)
            pooled[request_id].difference_update(gone)
        elif kind == "forget":
            reading.forget(request_id)
            pooled.pop(request_id, None)
        elif kind == "follow":
            scheduled = names
            reading.follow(dict.fromkeys(names, 1))
            wanted = {b for r in names for b in pooled.get(r, ())}
            assert reading.num_blocks == len(wanted)
        elif kind == "take":
            reading.follow(dict.fromkeys(scheduled, 1))
            loads = reading.take()
            sent = sent if loads is None else loads
            wanted = {b for r in scheduled for b in pooled.get(r, ())}
            assert np.array_equal(sent, merge([(b, rows.row_of(b)) for b in wanted], CHUNK_ROWS))
        reading.check_integrity(pooled)


def listed(runs: Runs | None) -> list[list[int]] | None:
    """Runs as they read best."""
    return None if runs is None else runs.tolist()


def test_the_same_loads_are_not_sent_twice() -> None:
    """A steady step says 'as before'; any change sends all runs."""
    reading, _ = make()
    for block in (10, 11, 14):
        reading.add("a", block)
    reading.follow({"a": 1})
    assert listed(reading.take()) == [[10, 0, 2], [14, 4, 1]]
    reading.follow({"a": 1})
    assert reading.take() is None
    reading.follow({})
    assert not reading.num_blocks
    reading.follow({"a": 1})
    assert listed(reading.take()) == [[10, 0, 2], [14, 4, 1]]


def test_a_request_that_ran_stays_marked_until_it_is_left_out() -> None:
    """Only what the step reads anyway is promoted."""
    reading, _ = make()
    reading.add("a", 10)
    reading.follow({"a": 1, "b": 1})
    assert reading.is_running("a")
    assert not reading.is_running("b"), "b has no pooled block"
    reading.follow({"b": 1})
    assert not reading.is_running("a")


def test_one_of_a_request_that_comes_and_goes_is_seen_at_its_next_turn() -> None:
    """What is remembered of a request between its turns follows its blocks."""
    reading, _ = make()
    reading.add("a", 10)
    reading.add("b", 14)
    reading.follow({"a": 1, "b": 1})
    reading.follow({"b": 1})
    reading.add("a", 11)
    reading.follow({"a": 1, "b": 1})
    assert listed(reading.take()) == [[10, 0, 2], [14, 4, 1]]
    reading.follow({"b": 1})
    reading.discard("a", 10)
    reading.follow({"a": 1, "b": 1})
    assert listed(reading.take()) == [[11, 1, 1], [14, 4, 1]]


def test_a_shared_block_stays_until_its_last_reader_leaves() -> None:
    """It loads once, whoever of its readers runs."""
    reading, _ = make()
    for name in "abc":
        reading.add(name, 12)
    reading.follow({"a": 1, "b": 1, "c": 1})
    assert listed(reading.take()) == [[12, 2, 1]]
    for names in ("c", "ab"):
        reading.follow(dict.fromkeys(names, 1))
        assert reading.take() is None
    reading.forget("b")
    assert reading.take() is None
    reading.follow({})
    assert listed(reading.take()) == []


def test_many_blocks_leave_together_as_one_by_one() -> None:
    """Those that another request reads stay, and who has none left is not running any more."""
    reading, _ = make()
    for name in "ab":
        reading.add_all(name, range(10, 22))
    reading.follow({"a": 1, "b": 1})
    reading.discard_all("a", range(10, 20))
    reading.check_integrity({"a": {20, 21}, "b": {*range(10, 22)}})
    reading.discard_all("b", range(10, 22))
    reading.check_integrity({"a": {20, 21}})
    assert not reading.is_running("b")
    assert listed(reading.take()) == [[20, 10, 2]]

"""ReadSet: exactly the pooled blocks of the scheduled requests, sent only when they change."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.plan import Copy
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.pool.rows import RowLedger

FIRST = 10
ROWS = 24
REQUESTS = "abcde"


def make() -> tuple[ReadSet, RowLedger]:
    rows = RowLedger(ROWS, FIRST)
    for block in range(FIRST, FIRST + ROWS):
        rows.take(block)
    return ReadSet(rows, 8), rows


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "discard", "forget", "follow", "follow", "take"]),
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
    sent: tuple[Copy, ...] = ()
    for kind, request_id, block, names in operations:
        if kind == "add":
            reading.add(request_id, block)
            pooled.setdefault(request_id, set()).add(block)
        elif kind == "discard" and block in pooled.get(request_id, ()):
            reading.discard(request_id, block)
            pooled[request_id].remove(block)
        elif kind == "forget":
            reading.forget(request_id)
            pooled.pop(request_id, None)
        elif kind == "follow":
            scheduled = names
            reading.follow(dict.fromkeys(names, 1))
            wanted = {b for r in names for b in pooled.get(r, ())}
            assert bool(reading.readers) == bool(wanted)
        elif kind == "take":
            reading.follow(dict.fromkeys(scheduled, 1))
            loads = reading.take()
            sent = sent if loads is None else loads
            wanted = {b for r in scheduled for b in pooled.get(r, ())}
            named = [run.block + i for run in sent for i in range(run.count)]
            assert sorted(named) == sorted(wanted)
            for run in sent:
                for i in range(run.count):
                    assert rows.row_of(run.block + i) == run.row + i
        reading.check_integrity(pooled)


def test_the_same_loads_are_not_sent_twice() -> None:
    """A steady step says 'as before'; any change sends all runs."""
    reading, _ = make()
    for block in (10, 11, 14):
        reading.add("a", block)
    reading.follow({"a": 1})
    assert reading.take() == (Copy(10, 0, 2), Copy(14, 4, 1))
    reading.follow({"a": 1})
    assert reading.take() is None
    reading.follow({})
    assert not reading.readers
    reading.follow({"a": 1})
    assert reading.take() == (Copy(10, 0, 2), Copy(14, 4, 1))


def test_a_request_that_ran_stays_marked_until_it_is_left_out() -> None:
    """Only what the step reads anyway is promoted."""
    reading, _ = make()
    reading.add("a", 10)
    reading.follow({"a": 1, "b": 1})
    assert reading.is_running("a")
    assert not reading.is_running("b"), "b has no pooled block"
    reading.follow({"b": 1})
    assert not reading.is_running("a")

"""RelabelLog: the newest id of every entry, merged, for those who still need it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.plan import Relabel
from pie_vllm.policy.placement.relabel_log import RelabelLog

RECORDS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 99)), max_size=60
)


@given(RECORDS, st.sets(st.sampled_from("abc")), st.sets(st.sampled_from("abc")))
def test_applying_the_relabels_gives_the_newest_ids(
    records: list[tuple[str, int, int]], live: set[str], fresh: set[str]
) -> None:
    """Runs never overlap or touch, and carry the last id recorded for each entry."""
    log = RelabelLog()
    newest: dict[tuple[str, int], int] = {}
    for request_id, index, block in records:
        log.record(request_id, index, [block])
        newest[request_id, index] = block
    relabels = log.drain(live, fresh)
    found = {
        (request_id, first + i): block
        for request_id, first, blocks in relabels
        for i, block in enumerate(blocks)
    }
    assert found == {key: b for key, b in newest.items() if key[0] in live - fresh}
    assert sum(len(r.blocks) for r in relabels) == len(found)
    ends = {(r.request_id, r.index + len(r.blocks)) for r in relabels}
    assert not ends & {(r.request_id, r.index) for r in relabels}, "neighbours are one run"


def test_draining_forgets() -> None:
    """Each change is told once, also one that nobody needed."""
    log = RelabelLog()
    log.record("a", 3, [7])
    log.record("a", 4, [9])
    log.record("gone", 0, [1])
    assert log.drain({"a"}, ()) == (Relabel("a", 3, (7, 9)),)
    assert log.drain({"a", "gone"}, ()) == ()

"""What the policies keep: ARC a hot set in spite of passes over other blocks, LRU not."""

from __future__ import annotations

import random

import pytest

from pie_vllm.policy.pool.arc import Arc
from pie_vllm.policy.pool.ghosts import Ghosts
from pie_vllm.policy.pool.parked_index import ParkedIndex
from tests.helpers.naive_parked import run_trace

ROWS = 100
HOT = 60


def loops_and_scans(scan: int, rounds: int) -> list[tuple[list[int], list[int]]]:
    """Of each round: twice over the hot set, then once over keys never asked for again."""
    fresh = iter(range(10**6, 10**9))
    return [([*range(HOT)] * 2, [next(fresh) for _ in range(scan)]) for _ in range(rounds)]


def hot_hits(policy: str, scan: int, rounds: int = 12) -> float:
    """Share of the first pass of each round over the hot set that hits, after two rounds."""
    index: ParkedIndex[int] = ParkedIndex(ROWS, policy)
    hits = 0
    for number, (hot, cold) in enumerate(loops_and_scans(scan, rounds)):
        found = run_trace(index, hot)[:HOT]
        hits += sum(found) if number >= 2 else 0
        run_trace(index, cold)
        index.check_integrity()
    return hits / (HOT * (rounds - 2))


@pytest.mark.parametrize("scan", [ROWS, 3 * ROWS, 30 * ROWS])
def test_arc_keeps_a_hot_set_that_lru_loses_to_a_scan(scan: int) -> None:
    """However long the scan is."""
    assert hot_hits("lru", scan) == 0
    assert hot_hits("arc", scan) > 0.95


def test_where_recency_decides_arc_is_about_as_good_as_lru() -> None:
    """A working set that moves on: what was used often once must not stay for ever."""

    def hits(policy: str) -> float:
        rng = random.Random(5)
        index: ParkedIndex[int] = ParkedIndex(ROWS, policy)
        trace = [rng.randrange(80) + 20 * (step // 200) for step in range(20_000)]
        return sum(run_trace(index, trace)) / len(trace)

    assert hits("lru") > 0.7
    assert hits("arc") > 0.9 * hits("lru")


def test_what_was_taken_and_comes_back_counts_as_seen_again() -> None:
    """It leaves after entries that were parked once, though it was parked before them."""
    index: ParkedIndex[str] = ParkedIndex(4, "arc")
    index.park("hit", 0)
    index.park("hit", index.take("hit"))
    for row, key in enumerate("xyz", start=1):
        index.park(key, row)
    assert [entry[0] for entry in iter(index.evict, None)] == ["x", "y", "z", "hit"]


def test_the_share_moves_towards_the_list_that_was_too_short() -> None:
    """A ghost of the first list makes it longer, one of the second shorter; both are bounded."""
    index: ParkedIndex[int] = ParkedIndex(4, "arc")
    order = index._order
    assert isinstance(order, Arc)
    run_trace(index, [1, 2, 3, 4, 5])  # 1 became a ghost of those seen once.
    assert order.target == 0
    run_trace(index, [1])
    assert order.target == 1
    run_trace(index, [2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert 1 < order.target <= 4
    index.clear()
    assert order.target == 0
    run_trace(index, [1, 1, 2, 2, 3, 3, 4, 4, 5])  # All seen twice: 1 goes, and comes back.
    order.target = 2.0
    run_trace(index, [1])
    assert order.target == 1


def test_a_cleared_index_has_seen_nothing() -> None:
    """Weights changed: nothing that is remembered means anything."""
    index: ParkedIndex[int] = ParkedIndex(4, "arc")
    run_trace(index, [1, 1, 2, 3, 4, 5, 6])
    order = index._order
    assert isinstance(order, Arc)
    assert len(order.ghosts)
    index.clear()
    assert not len(order.ghosts)
    run_trace(index, [1, 2])
    assert index.evict() is not None
    assert index.row_of(2) is not None


def test_ghosts_are_bounded_and_the_longest_list_pays() -> None:
    """The oldest of it goes."""
    ghosts = Ghosts(4, 2)
    for key in "abc":
        ghosts.remember(0, key)
    ghosts.remember(1, "x")
    ghosts.remember(1, "y")
    ghosts.check_integrity()
    assert (len(ghosts), ghosts.length(0), ghosts.length(1)) == (4, 2, 2)
    assert [ghosts.recall(key) for key in "abcxyz"] == [-1, 0, 0, 1, 1, -1]
    assert len(ghosts) == 0
    ghosts.check_integrity()


def test_a_ghost_is_in_one_list() -> None:
    """The last one that remembered it."""
    ghosts = Ghosts(3, 2)
    ghosts.remember(0, "a")
    ghosts.remember(1, "a")
    assert (len(ghosts), ghosts.recall("a")) == (1, 1)


def test_an_index_without_rows_is_harmless() -> None:
    """A pool of size zero parks nothing."""
    index: ParkedIndex[str] = ParkedIndex(0, "arc")
    assert index.evict() is None
    assert index.clear() == []
    assert "a" not in index

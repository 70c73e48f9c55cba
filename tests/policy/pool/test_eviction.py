"""LeastRecentlyUsed: what leaves first, and what is told of extents that are not there."""

from __future__ import annotations

from pie_vllm.policy.pool.eviction import LeastRecentlyUsed


def four() -> LeastRecentlyUsed:
    """Four extents, the first the oldest."""
    order = LeastRecentlyUsed()
    for extent in range(4):
        order.use(extent)
    return order


def drained(order: LeastRecentlyUsed) -> list[int]:
    """All extents in the order in which they leave."""
    found = []
    while (oldest := order.oldest) is not None:
        found.append(oldest)
        order.remove(oldest)
    return found


def test_what_was_used_least_recently_leaves_first() -> None:
    """A use makes an extent the youngest; a look does not."""
    order = four()
    order.use_again(0)
    assert order.oldest == 1
    assert 1 in order
    order.use(2)
    assert drained(order) == [1, 3, 0, 2]


def test_a_pass_over_more_than_there_is_room_for_leaves_nothing() -> None:
    """No extent is kept because it was used often: that is the policy."""
    order = four()
    for _ in range(9):
        order.use(0)
    for extent in range(4, 8):
        order.use(extent)
    assert drained(order)[:4] == [1, 2, 3, 0]


def test_an_extent_that_is_not_there_changes_nothing() -> None:
    """Neither its use again nor its removal."""
    order = four()
    order.remove(2)
    order.remove(2)
    order.use_again(2)
    assert (len(order), 2 in order) == (3, False)
    order.clear()
    assert order.oldest is None

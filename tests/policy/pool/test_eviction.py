"""LeastRecentlyUsed: what leaves first, and what is told of keys that are not there."""

from __future__ import annotations

from pie_vllm.policy.pool.eviction import LeastRecentlyUsed


def abc() -> LeastRecentlyUsed[str]:
    """Three keys, the first the oldest."""
    order: LeastRecentlyUsed[str] = LeastRecentlyUsed()
    for row, key in enumerate("abc"):
        order.add(key, row)
    return order


def test_what_was_used_least_recently_leaves_first() -> None:
    """An addition and a use make a key the youngest; a look does not."""
    order = abc()
    assert order.use("a")
    assert order.row_of("b") == 1
    assert [order.evict() for _ in range(4)] == [("b", 1), ("c", 2), ("a", 0), None]


def test_a_pass_over_more_than_there_is_room_for_leaves_nothing() -> None:
    """No key is kept because it was used often: that is the policy."""
    order = abc()
    for _ in range(9):
        order.use("a")
    for row, key in enumerate("xyz", 3):
        order.add(key, row)
    assert [order.evict() for _ in "abc"] == [("b", 1), ("c", 2), ("a", 0)]


def test_a_key_that_is_not_there_changes_nothing() -> None:
    """It is told by what the call returns."""
    order = abc()
    assert (order.remove("b"), order.remove("b"), order.row_of("b")) == (1, None, None)
    assert not order.use("b")
    assert list(order.items()) == [("a", 0), ("c", 2)]
    assert len(order) == 2
    order.clear()
    assert order.evict() is None

"""ParkedIndex: one row a key, nothing lost, and nothing pinned evicted."""

from __future__ import annotations

import random

import pytest

from pie_vllm.errors import ConfigError, IntegrityError
from pie_vllm.policy.pool.parked_index import POLICIES, ParkedIndex
from tests.helpers.naive_parked import naive

CALLS = ("park", "park", "park", "take", "touch", "evict", "pin", "unpin", "drop")
EACH_POLICY = pytest.mark.parametrize("policy", sorted(POLICIES))


@EACH_POLICY
def test_what_is_parked_is_found_until_it_leaves(policy: str) -> None:
    """A look-up changes nothing; a take, an eviction and a drop do."""
    index: ParkedIndex[bytes] = ParkedIndex(8, policy)
    for row, key in enumerate((b"a", b"b", b"c", b"d")):
        index.park(key, row)
    assert [index.row_of(k) for k in (b"a", b"b", b"c", b"d", b"e")] == [0, 1, 2, 3, None]
    assert index.rows() == {0, 1, 2, 3}
    assert index.take(b"b") == 1
    assert index.evict() == (b"a", 0)
    assert index.drop_rows_from(3) == [3]
    assert [k in index for k in (b"a", b"b", b"c", b"d")] == [False, False, True, False]
    assert (len(index), index.evictable) == (1, 1)
    index.check_integrity()
    assert index.clear() == [2]
    assert index.evict() is None
    index.check_integrity()


@EACH_POLICY
def test_looking_up_does_not_make_young(policy: str) -> None:
    """`row_of` and `in` leave the order alone; `touch` does not."""
    index: ParkedIndex[str] = ParkedIndex(3, policy)
    for row, key in enumerate("abc"):
        index.park(key, row)
    assert index.row_of("a") == 0
    assert "a" in index
    assert index.evict() == ("a", 0)
    index.touch("b")
    assert index.evict() == ("c", 2)


@EACH_POLICY
def test_pinned_entries_stay(policy: str) -> None:
    """As many pins as unpins; an entry is as young as a used one afterwards."""
    index: ParkedIndex[str] = ParkedIndex(4, policy)
    for row, key in enumerate("abc"):
        index.park(key, row)
    index.pin("a")
    index.pin("a")
    index.pin("b")
    assert index.evictable == 1
    assert index.evict() == ("c", 2)
    assert index.evict() is None
    for refused in (lambda: index.take("a"), index.clear, lambda: index.drop_rows_from(1)):
        with pytest.raises(IntegrityError, match="pinned"):
            refused()
    assert index.drop_rows_from(2) == []
    index.unpin("a")
    index.unpin("b")
    assert index.evict() == ("b", 1)
    index.unpin("a")
    index.check_integrity()
    assert index.take("a") == 0
    index.check_integrity()


def test_a_pinned_entry_that_was_used_counts_as_seen_again() -> None:
    """ARC keeps it before entries seen once, whatever their age."""
    index: ParkedIndex[str] = ParkedIndex(4, "arc")
    for row, key in enumerate("abc"):
        index.park(key, row)
        index.pin(key)
    index.touch("a")
    for key in "abc":
        index.unpin(key)
    assert [entry[0] for entry in iter(index.evict, None)] == ["b", "c", "a"]


@EACH_POLICY
def test_wrong_calls_are_refused_and_change_nothing(policy: str) -> None:
    """No key twice, no row twice, no foreign row, nothing that is not parked."""
    index: ParkedIndex[str] = ParkedIndex(2, policy)
    index.park("a", 1)
    for wrong, text in (
        (lambda: index.park("a", 0), "parked already"),
        (lambda: index.park("b", 1), "row 1 holds"),
        (lambda: index.park("b", 2), "row 2 is none of 2"),
        (lambda: index.park("b", -1), "row -1"),
        (lambda: index.take("b"), "not parked"),
        (lambda: index.touch("b"), "not parked"),
        (lambda: index.pin("b"), "not parked"),
        (lambda: index.unpin("a"), "not pinned"),
    ):
        with pytest.raises(IntegrityError, match=text):
            wrong()
        index.check_integrity()
    assert (len(index), index.row_of("a")) == (1, 1)


def test_an_unknown_policy_is_named_with_the_way_out() -> None:
    """The user sees what to write instead."""
    with pytest.raises(ConfigError, match=r"'fifo'.*arc, lru"):
        ParkedIndex(4, "fifo")


@EACH_POLICY
@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_gives_what_the_plain_model_gives(policy: str, seed: int) -> None:
    """The same rows, the same victims in the same order, and sound books at each call."""
    rng = random.Random(seed)
    capacity = rng.choice((1, 2, 5, 16, 40))
    index: ParkedIndex[int] = ParkedIndex(capacity, policy)
    model = naive(policy, capacity)
    keys = range(3 * capacity)
    for _ in range(400):
        free = [r for r in range(capacity) if r not in model.rows.values()]
        parked = list(model.rows)
        call = rng.choice(
            ("park", "park", "park", "take", "touch", "evict", "pin", "unpin", "drop")
        )
        if call == "park":
            key = rng.choice(keys)
            if key not in model.rows and free:
                row = rng.choice(free)
                model.park(key, row)
                index.park(key, row)
        elif call == "evict" or (call != "drop" and not parked):
            assert index.evict() == model.evict()
        elif call == "drop":
            row = rng.randrange(capacity)
            if rng.random() < 0.2 and not any(model.rows[k] >= row for k in model.pins):
                assert index.drop_rows_from(row) == model.drop_rows_from(row)
        elif call == "unpin":
            if model.pins:
                key = rng.choice(list(model.pins))
                model.unpin(key)
                index.unpin(key)
        else:
            key = rng.choice(parked)
            if call == "take" and key in model.pins:
                continue
            assert getattr(index, call)(key) == getattr(model, call)(key)
        index.check_integrity()
        assert len(index) == len(model.rows)
        assert index.evictable == len(model.rows) - len(model.pins)
        assert [index.row_of(key) for key in keys] == [model.rows.get(key) for key in keys]
    for key in list(model.pins):
        while key in model.pins:
            model.unpin(key)
            index.unpin(key)
    while (expected := model.evict()) is not None:
        assert index.evict() == expected
    assert index.evict() is None


def test_broken_books_are_noticed() -> None:
    """The check can fail: a key without a row, a row out of order."""
    index: ParkedIndex[str] = ParkedIndex(4)
    index.park("a", 0)
    index._order.hold(0)
    with pytest.raises(IntegrityError):
        index.check_integrity()
    index._order.release(0)
    index.check_integrity()
    index._keys[1] = "b"
    with pytest.raises(IntegrityError):
        index.check_integrity()

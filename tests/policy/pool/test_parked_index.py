"""ParkedIndex: one row a key, nothing lost, and nothing pinned evicted."""

from __future__ import annotations

import random
from itertools import takewhile

import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.parked_index import ParkedIndex
from tests.helpers.naive_parked import NaiveExtents, NaiveIndex, evict


def parked(keys: str, rows: int = 8) -> ParkedIndex[str]:
    """An index of these keys, in rows 0, 1, ..."""
    index: ParkedIndex[str] = ParkedIndex(rows)
    for row, key in enumerate(keys):
        index.park(key, row)
    return index


def test_what_is_parked_is_found_until_it_leaves() -> None:
    """A look-up changes nothing; a removal and an eviction do."""
    index = parked("abcd")
    assert [index.row_of(k) for k in "abcde"] == [0, 1, 2, 3, None]
    assert sorted(index.rows()) == [0, 1, 2, 3]
    assert index.remove("b") == 1
    assert evict(index) == ("a", 0)
    assert sorted(index.keys_in({0, 1, 3})) == ["d"]
    assert [k in index for k in "abcd"] == [False, False, True, True]
    assert len(index) == 2
    index.check_integrity()
    assert sorted(index.clear()) == [2, 3]
    assert evict(index) is None
    index.check_integrity()


def test_looking_up_does_not_make_young() -> None:
    """`row_of` and `in` leave the order alone; `touch` does not."""
    index = parked("abc")
    assert index.row_of("a") == 0
    assert "a" in index
    assert evict(index) == ("a", 0)
    assert index.touch("b")
    assert not index.touch("a")
    assert evict(index) == ("c", 2)


def test_pinned_entries_stay() -> None:
    """Until all are unpinned; then they are the youngest, the one pinned last most of all."""
    index = parked("abcd")
    index.pin("ca")
    index.pin("c")
    assert (index.num_pinned, len(index)) == (2, 4)
    assert (index.pinned_rows, index.row_of("c"), index.row_of("b")) == ({0, 2}, 2, 1)
    assert index.touch("a"), "it is parked"
    assert sorted(index.keys_in({0, 1, 2})) == ["a", "b", "c"]
    assert sorted(index.rows()) == [0, 1, 2, 3]
    for refused in (lambda: index.remove("a"), index.clear, lambda: index.park("a", 7)):
        with pytest.raises(IntegrityError, match=r"pinned|parked already"):
            refused()
    assert [evict(index), evict(index), evict(index)] == [("b", 1), ("d", 3), None]
    index.park("e", 1)
    index.unpin_all()
    index.check_integrity()
    assert index.num_pinned == 0
    assert [evict(index) for _ in range(4)] == [("e", 1), ("c", 2), ("a", 0), None]


def test_wrong_calls_are_refused_and_change_nothing() -> None:
    """No key twice, no foreign row, nothing that is not parked."""
    index: ParkedIndex[str] = ParkedIndex(2)
    index.park("a", 1)
    for wrong, text in (
        (lambda: index.park("a", 0), "parked already"),
        (lambda: index.park("b", 2), "row 2 is none of 2"),
        (lambda: index.park("b", -1), "row -1"),
        (lambda: index.remove("b"), "not parked"),
        (lambda: index.pin(["b"]), "not parked"),
    ):
        with pytest.raises(IntegrityError, match=text):
            wrong()
        index.check_integrity()
    assert (len(index), index.row_of("a"), index.num_pinned) == (1, 1, 0)


def test_an_index_without_rows_is_harmless() -> None:
    """A pool of size zero parks nothing."""
    index: ParkedIndex[str] = ParkedIndex(0)
    assert evict(index) is None
    assert index.clear() == []
    assert "a" not in index


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_gives_what_the_plain_model_gives(seed: int) -> None:
    """The same rows, the same victims in the same order, and sound books at each call."""
    rng = random.Random(seed)
    capacity = rng.choice((1, 2, 5, 16, 40))
    index: ParkedIndex[int] = ParkedIndex(capacity)
    model = NaiveIndex()
    keys = range(3 * capacity)
    calls = ("park", "park", "park", "remove", "touch", "touch", "evict", "pin", "unpin_all")
    for _ in range(400):
        free = [r for r in range(capacity) if r not in model.rows.values()]
        call, key = rng.choice(calls), rng.choice(keys)
        if call == "park":
            if key not in model.rows and free:
                row = rng.choice(free)
                model.park(key, row)
                index.park(key, row)
        elif call == "evict":
            assert evict(index) == model.evict()
        elif call == "touch":
            assert index.touch(key) == model.touch(key)
        elif call == "remove":
            if key in model.order:
                assert index.remove(key) == model.remove(key)
        elif call == "pin":
            run = rng.sample(list(model.rows), min(len(model.rows), rng.randint(1, 4)))
            model.pin(run)
            index.pin(run)
        else:
            model.unpin_all()
            index.unpin_all()
        index.check_integrity()
        assert (len(index), index.num_pinned) == (len(model.rows), len(model.pinned))
        assert [index.row_of(key) for key in keys] == [model.rows.get(key) for key in keys]
        assert index.pinned_rows == {model.rows[key] for key in model.pinned}
    model.unpin_all()
    index.unpin_all()
    while (expected := model.evict()) is not None:
        assert evict(index) == expected
    assert evict(index) is None


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_over_extents_gives_what_the_plain_model_gives(seed: int) -> None:
    """The same victims in the same order, one by one and many at once, sound books at each call."""
    rng = random.Random(seed)
    size, extents = rng.choice((2, 4, 8)), rng.randint(1, 6)
    capacity = size * extents - rng.randrange(size)
    index: ParkedIndex[int] = ParkedIndex(capacity, size)
    model = NaiveExtents(capacity, size)
    keys = range(2 * capacity)
    calls = ("park", "park", "park_all", "remove", "touch", "touch_first", "evict", "pin", "unpin")
    for _ in range(300):
        free = [row for row in range(capacity) if row not in model.rows.values()]
        call, some = rng.choice(calls), rng.sample(keys, min(len(keys), rng.randint(1, 6)))
        new = [key for key in some if key not in model.rows][: len(free)]
        if call == "park" and new:
            model.park(new[0], free[0])
            index.park(new[0], free[0])
        elif call == "park_all" and new:
            assert index.lacking(new) == new
            rows = rng.sample(free, len(new))
            index.park_all(new, rows)
            for key, row in zip(new, rows, strict=True):
                model.park(key, row)
        elif call == "evict":
            assert evict(index) == model.evict()
        elif call == "touch":
            assert [index.touch(key) for key in some] == [model.touch(key) for key in some]
        elif call == "touch_first":
            found = [*takewhile(model.touch, some)]
            assert index.touch_first(some) == len(found)
        elif call == "remove":
            for key in some:
                if key in model.rows and key not in model.pinned:
                    assert index.remove(key) == model.remove(key)
        elif call == "pin":
            there = [key for key in some if key in model.rows]
            model.pin(there)
            assert index.pin(there) == [model.rows[key] for key in there]
        elif call == "unpin":
            model.unpin_all()
            index.unpin_all()
        index.check_integrity()
        assert [index.row_of(key) for key in keys] == [model.rows.get(key) for key in keys]
        assert index.pinned_rows == {model.rows[key] for key in model.pinned}
        assert index.num_pinned == len(model.pinned)
    while (expected := model.evict()) is not None:
        assert evict(index) == expected
    assert evict(index) is None


def test_a_context_is_made_young_by_few_of_its_keys() -> None:
    """Keys of a chain in the rows of their places: all of its extents are younger than others."""
    size = 8
    index: ParkedIndex[int] = ParkedIndex(96, size)
    first = 5  # Of its first and of its last extent it has a part.
    for row in (*range(first, first + 35), *range(64, 96)):
        index.park(row, row)
    assert index.oldest_row == 0
    index.touch_run([*range(first, first + 35)][::-1])
    gone = [evict(index) for _ in range(67)]
    others = [row for end in (72, 80, 88, 96) for row in reversed(range(end - size, end))]
    assert [key for key, _ in filter(None, gone)][:32] == others
    assert [row for _, row in filter(None, gone)][-3:] == [7, 6, 5], "its first blocks go last"


def test_broken_books_are_noticed() -> None:
    """The check can fail: two keys of one row, a row beyond the pool, a pinned key in the order."""
    index = parked("ab")
    index._rows["c"] = 1
    with pytest.raises(IntegrityError, match="share a row"):
        index.check_integrity()
    index = parked("ab")
    index.capacity_rows = 1
    with pytest.raises(IntegrityError, match="none of the pool"):
        index.check_integrity()
    index = parked("ab")
    index._pinned[0] = None
    with pytest.raises(IntegrityError, match="may be evicted"):
        index.check_integrity()
    index = parked("ab")
    index.pinned_rows.add(0)
    with pytest.raises(IntegrityError, match="pinned key may be evicted"):
        index.check_integrity()
    index = parked("ab")
    index._keys[7] = "a"
    with pytest.raises(IntegrityError, match="disagree"):
        index.check_integrity()
    index = parked("ab")
    index._parked_in[0] = 2
    with pytest.raises(IntegrityError, match="count of an extent"):
        index.check_integrity()

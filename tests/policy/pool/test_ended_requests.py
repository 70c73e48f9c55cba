"""EndedRequests: whole or not at all, the oldest given up first, and no row lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pie_vllm.policy.pool.ended_requests import TokensOf
from tests.helpers.fakes import FakePool
from tests.helpers.parked_steps import make, take

SIZE = 16
LAST = (7, 8, 9)
"""Tokens behind the full block."""


def tokens(*last: int) -> TokensOf:
    """Tokens of a request that are these behind its first block."""

    def of(first: int, end: int) -> Sequence[int] | None:
        return last[first - SIZE : end - SIZE] if end <= SIZE + len(last) else None

    return of


def end(pool: FakePool, name: str, key: str, last: tuple[int, ...] = LAST) -> bool:
    """A request with a full block, one that is begun, and a window ends and is kept."""
    take(pool, name, 3)
    full, begun, window = pool.tables[name]
    full.block_hash = key
    pool.cached[key] = full
    blocks: list[tuple[Any, int, int | None]] = [(begun, 1, None), (window, 1, 1)]
    tails, ended = pool.residency.parking.tails, pool.residency.parking.ended
    kept = tails.keep_whole(name, blocks, [key], SIZE + len(last), len(last), spare_only=True)
    kept = kept and ended.keep(name, tokens(*last))
    pool.free(name)
    pool.residency.end_step({}, (), False, None)
    pool.residency.check_integrity()
    return kept


def found(pool: FakePool, *last: int, more_than: int = 0, keys: str = "x") -> object:
    """Key of what is found for a request with these full blocks and tokens behind the first."""
    longest = pool.residency.parking.ended.longest([*keys], tokens(*last), more_than)
    return None if longest is None else longest[0]


def test_one_that_begins_with_all_tokens_takes_it_over() -> None:
    """As if it had been preempted itself; then nobody else finds it."""
    pool = make(preempted_only=True)
    parking = pool.residency.parking
    assert end(pool, "a", "x")
    assert parking.wanted is not None
    assert "x" in parking.wanted
    assert (len(parking.tails), len(parking.ended), parking.ended.changes) == (0, 1, 1)
    assert found(pool, *LAST, 10, keys="xy") == "x"
    parking.ended.take_over("x", "b")
    tail = parking.tails.find("b")
    assert tail is not None
    assert (tail.index, tail.tokens, len(tail.blocks)) == (1, SIZE + 3, 2)
    assert found(pool, *LAST, 10) is None
    assert "x" in parking.wanted
    parking.tails.drop("b")
    assert (len(parking.wanted), pool.residency.rows.num_parked) == (0, 0)  # type: ignore[arg-type]


def test_others_do_not_find_it() -> None:
    """Other last tokens, fewer of them, other full blocks, or more tokens found elsewhere."""
    pool = make(preempted_only=True)
    end(pool, "a", "x")
    assert found(pool, 7, 8, 0, 10) is None
    assert found(pool, 7, 8) is None
    assert found(pool, *LAST, keys="y") is None
    assert found(pool, *LAST, more_than=SIZE + 3) is None
    assert found(pool, *LAST, more_than=SIZE + 2) == "x"


def test_the_longest_one_is_found() -> None:
    """Of a chat's turns, the last."""
    pool = make(resident=12, preempted_only=True)
    end(pool, "a", "x")
    end(pool, "b", "y", last=(7,))
    assert found(pool, 7, 8, 9, keys="xy") == "y"
    assert found(pool, 7, 8, 9, keys="x") == "x"


def test_what_the_coming_step_stores_is_not_found() -> None:
    """Its rows hold nothing yet."""
    pool = make(preempted_only=True)
    parking = pool.residency.parking
    end(pool, "a", "x")
    row = parking.ended.rows()[0]
    parking.copies.stores[row] = 3
    assert found(pool, *LAST) is None
    del parking.copies.stores[row]
    assert found(pool, *LAST) == "x"


def test_without_tokens_or_keys_nothing_is_kept() -> None:
    """Nobody could tell whether it is his."""
    pool = make(preempted_only=True)
    tails, ended = pool.residency.parking.tails, pool.residency.parking.ended
    take(pool, "a", 1)
    block = pool.tables["a"][0]
    assert tails.keep_whole("a", [(block, 0, None)], [], 3, 3)
    assert not ended.keep("a", tokens(1, 2, 3))
    pool.residency.parking.take()
    assert tails.keep_whole("a", [(block, 1, None)], ["x"], SIZE + 3, 3)
    assert not ended.keep("a", lambda *_: None)
    assert (len(ended), len(tails), len(tails.keys)) == (0, 0, 0)
    assert pool.residency.rows.num_parked == 0
    assert not pool.residency.parking.copies.stores


def test_of_two_that_share_a_window_one_is_kept() -> None:
    """A step stores a page once; in the next step, either is."""
    pool = make(preempted_only=True)
    tails, ended = pool.residency.parking.tails, pool.residency.parking.ended
    take(pool, "a", 2)
    blocks: list[tuple[Any, int, int | None]] = [(b, 1, 1) for b in pool.tables["a"]]
    assert tails.keep_whole("a", blocks[:1], ["x"], SIZE, 0)
    assert not tails.keep_whole("b", blocks, ["y"], SIZE, 0)
    assert tails.keep_whole("c", blocks[1:], ["z"], SIZE, 0)
    assert ended.keep("a", tokens())
    ended.drop("x")
    tails.drop("c")
    assert pool.residency.end_step({}, (), False, None) is None
    assert tails.keep_whole("b", blocks, ["y"], SIZE, 0)


def test_a_later_turn_of_the_same_blocks_takes_the_place() -> None:
    """Rows of the one before are free."""
    pool = make(preempted_only=True)
    end(pool, "a", "x")
    pool.drop(pool.cached["x"])
    end(pool, "b", "x", last=(1, 2))
    assert len(pool.residency.parking.ended.rows()) == 2
    assert found(pool, *LAST) is None
    assert found(pool, 1, 2, 3) == "x"


def test_the_oldest_is_given_up_with_its_full_blocks() -> None:
    """Before anything else that is parked; what another one has in common stays."""
    pool = make(resident=12, rows=7, preempted_only=True)
    parking, rows = pool.residency.parking, pool.residency.rows
    end(pool, "a", "x")
    end(pool, "b", "y")
    parking.evicted(["x", "y"], [1, 2])
    pool.residency.end_step({}, (), False, None)
    assert (len(parking), rows.num_free) == (2, 1)
    end(pool, "c", "z")
    assert [*parking.ended._ended] == ["y", "z"]
    assert not parking.parked("x")
    assert parking.parked("y")
    pool.residency.check_integrity()


def test_a_request_that_comes_again_keeps_its_rows() -> None:
    """Ended ones get spare rows, and those of older ones."""
    pool = make(resident=12, rows=3, preempted_only=True)
    tails = pool.residency.parking.tails
    take(pool, "p", 2)
    blocks: list[tuple[Any, int, int | None]] = [
        (b, i, None) for i, b in enumerate(pool.tables["p"])
    ]
    assert tails.keep_whole("p", blocks, ["w"], 19, 3)
    pool.residency.end_step({}, (), False, None)
    assert not end(pool, "a", "x")
    assert tails.find("p") is not None
    assert pool.residency.rows.num_free == 1


def test_wrong_rows_and_new_weights_are_forgotten() -> None:
    """And what a request with wrong KV left; no key is wanted any more, and all rows are free."""
    for forget in (
        lambda parking: parking.forget_spoilt((), {parking.ended.rows()[0]}, ()),
        lambda parking: parking.forget_spoilt((), (), {"a"}),
        lambda parking: parking.clear(),
    ):
        pool = make(preempted_only=True)
        parking = pool.residency.parking
        end(pool, "a", "x")
        forget(parking)
        assert (len(parking.ended), len(parking.tails.keys)) == (0, 0)
        assert pool.residency.rows.num_parked == 0
        parking.check_integrity()

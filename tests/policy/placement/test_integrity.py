"""The check of the books: each one that disagrees with the tables is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.geometry import Geometry
from tests.helpers.fakes import FakeBlock, FakePool

RESIDENT = 8


def demoted() -> FakePool:
    """Two requests of four blocks each over seven residents: one block is pooled."""
    pool = FakePool(Geometry(2, 4096, RESIDENT, 8, 1, 8, 3, 4096))
    for name in ("old", "new"):
        pool.tables[name] = []
        pool.residency.admit(name)
        assert pool.allocate(name, 4)
        pool.residency.admitted(name)
        pool.residency.computed_again(name, 3)
    assert pool.residency.pooled_in_use == 1
    pool.residency.check_integrity()
    return pool


def pooled_block(pool: FakePool) -> FakeBlock:
    return next(b for t in pool.tables.values() for b in t if b.block_id >= RESIDENT)


def one_user_more(pool: FakePool) -> None:
    pool.tables["new"][3].ref_cnt = 2


def a_foreign_block(pool: FakePool) -> None:
    table = pool.tables["new"]
    table[3] = FakeBlock(table[3].block_id)


def a_table_cut_short(pool: FakePool) -> None:
    del pool.tables["new"][2:]


def an_incomplete_block_flagged(pool: FakePool) -> None:
    pool.residency.victims.full[pool.tables["new"][3].block_id] = 1


def a_count_off_by_one(pool: FakePool) -> None:
    pool.residency.queue.demotable += 1
    pool.residency.queue.refresh()


def a_pooled_block_without_a_row(pool: FakePool) -> None:
    pool.residency.rows.release(pooled_block(pool).block_id)


def a_pooled_block_that_is_written(pool: FakePool) -> None:
    for holder in pool.residency.victims.holders.values():
        holder.full = 0


def a_pooled_block_that_nobody_reads(pool: FakePool) -> None:
    for name in pool.tables:
        pool.residency.read_set.forget(name)


def a_page_restored_that_counts_as_complete(pool: FakePool) -> None:
    residents = [b.block_id for b in pool.tables["old"] if b.block_id < RESIDENT]
    pool.residency.parking.copies.restores[residents[0]] = 7


def a_copy_of_a_pooled_block(pool: FakePool) -> None:
    pool.residency.parking.copies.restores[pooled_block(pool).block_id] = 7


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (one_user_more, "ref_cnt"),
        (a_foreign_block, "foreign block"),
        (a_table_cut_short, "more full blocks"),
        (an_incomplete_block_flagged, "full flags"),
        (a_count_off_by_one, "demotable count"),
        (a_pooled_block_without_a_row, "row and content"),
        (a_pooled_block_that_is_written, "is written"),
        (a_pooled_block_that_nobody_reads, "pooled blocks of the requests"),
        (a_page_restored_that_counts_as_complete, "counts as complete"),
        (a_copy_of_a_pooled_block, "names a pooled block"),
    ],
)
def test_a_book_that_is_off_is_noticed(broken: Callable[[FakePool], None], text: str) -> None:
    """Each check of its own, by its own words."""
    pool = demoted()
    broken(pool)
    with pytest.raises(IntegrityError, match=text):
        pool.residency.check_integrity()

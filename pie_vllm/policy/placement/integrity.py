"""The books of placement, checked from scratch against the block tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.block import Block, BlockId, RequestId, Table
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.placement.victims import Victims
from pie_vllm.policy.pool.parked_kv import Parking
from pie_vllm.policy.pool.rows import RowLedger


class Books(Protocol):
    """What is checked: ``Residency``, read only."""

    @property
    def blocks(self) -> Sequence[Block]:
        """All blocks, by id."""

    @property
    def boundary(self) -> int:
        """Number of resident blocks."""

    @property
    def shared(self) -> bool:
        """Whether groups of layers without a pool use residents, too."""

    @property
    def tables(self) -> Mapping[RequestId, Table]:
        """Block table of each request."""

    @property
    def queue(self) -> TieredFreeBlockQueue:
        """Free blocks of both tiers."""

    @property
    def rows(self) -> RowLedger:
        """Rows of the CPU pool."""

    @property
    def victims(self) -> Victims:
        """Requests that hold blocks, and which residents are complete."""

    @property
    def read_set(self) -> ReadSet:
        """Pooled blocks of the requests."""

    @property
    def parking(self) -> Parking:
        """KV that no request uses."""


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise IntegrityError(text)


def check_books(books: Books) -> None:
    """Check that all books agree; costs a pass over all blocks.

    Raises:
        IntegrityError: a book disagrees with the block tables or with another one.
    """
    boundary, blocks, queue = books.boundary, books.blocks, books.queue
    queue.check_integrity()
    books.rows.check_integrity()
    books.victims.check_integrity()
    users, pooled = _check_tables(books)
    for block in blocks:
        block_id = block.block_id
        others = books.shared and block_id < boundary and not users[block_id]
        if not (block.is_null or others):
            _require(block.ref_cnt == users[block_id], f"ref_cnt of {block_id}")
    for block in blocks[boundary:]:
        block_id = block.block_id
        blank = queue.is_blank(block_id)
        _require(blank != books.rows.holds(block_id), f"pooled block {block_id}: row and content")
        _require(not (blank and users[block_id]), f"blank block {block_id} is in use")
    books.read_set.check_integrity(pooled)
    books.parking.check_integrity()
    for resident in (*books.parking.copies.stores.values(), *books.parking.copies.restores):
        _require(resident < boundary, "a copy of a resident page names a pooled block")
    for resident in books.parking.copies.restores:
        _require(
            not books.victims.full[resident], "a block that is not filled yet counts as complete"
        )


def _check_tables(books: Books) -> tuple[Counter[BlockId], dict[RequestId, set[BlockId]]]:
    """Check what is known of the requests; the users of each block, the pooled ones of each."""
    boundary, full = books.boundary, books.victims.full
    users: Counter[BlockId] = Counter()
    complete: set[int] = set()
    pooled: dict[RequestId, set[BlockId]] = {}
    for request_id, holder in books.victims.holders.items():
        table = books.tables.get(request_id, [])
        _require(holder.full <= len(table), f"{request_id}: more full blocks than blocks")
        pooled[request_id] = {b.block_id for b in table if b.block_id >= boundary}
        for index, block in enumerate(table):
            if block.is_null:
                continue
            block_id = block.block_id
            _require(books.blocks[block_id] is block, "a table names a foreign block")
            users[block_id] += 1
            if index >= holder.full:
                _require(block_id < boundary, f"{request_id}: pooled block is written")
            elif block_id < boundary and full[block_id]:
                complete.add(block_id)
    flagged = {block_id for block_id in range(boundary) if full[block_id]}
    _require(flagged == complete, "full flags disagree with the tables")
    _require(books.queue.demotable == len(flagged), "demotable count disagrees")
    return users, pooled

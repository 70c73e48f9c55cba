"""The books of Residency, checked from scratch. Used by tests after each operation."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pie_vllm.errors import IntegrityError

if TYPE_CHECKING:
    from pie_vllm.policy.placement.residency import Residency


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise IntegrityError(text)


def check_residency(r: Residency) -> None:
    """Raise IntegrityError at the first book that disagrees with the block tables."""
    boundary = r.boundary
    r.queue.check_integrity()
    r.rows.check_integrity()
    r.victims.check_integrity()
    users: Counter[int] = Counter()
    full: set[int] = set()
    pooled: dict[str, set[int]] = {}
    for request_id, request in r._requests.items():
        table = r.tables.get(request_id, [])
        _require(request.full <= len(table), f"{request_id}: more full blocks than blocks")
        pooled[request_id] = {b.block_id for b in table if b.block_id >= boundary}
        for index, block in enumerate(table):
            if block.is_null:
                continue
            _require(r._blocks[block.block_id] is block, "a table names a foreign block")
            users[block.block_id] += 1
            if index >= request.full:
                _require(block.block_id < boundary, f"{request_id}: pooled block is written")
            elif r._full[block.block_id] if block.block_id < boundary else False:
                full.add(block.block_id)
    for block in r._blocks:
        if not block.is_null:
            _require(block.ref_cnt == users[block.block_id], f"ref_cnt of {block.block_id}")
    flagged = {i for i in range(boundary) if r._full[i]}
    _require(flagged == full, "full flags disagree with the tables")
    _require(r.queue.demotable == len(flagged), "demotable count disagrees")
    for block_id in range(boundary, len(r._blocks)):
        blank = r.queue.is_blank(block_id)
        _require(blank != r.rows.holds(block_id), f"pooled block {block_id}: row and content")
        _require(not (blank and users[block_id]), f"blank block {block_id} is in use")
    r.reading.check_integrity(pooled)
    r.parking.check_integrity()
    for resident in (*r.parking.copies.stores.values(), *r.parking.copies.restores):
        _require(resident < boundary, "a copy of a resident page names a pooled block")
    for resident in r.parking.copies.restores:
        _require(not r._full[resident], "a block that is not filled yet counts as complete")

"""Which blocks in use give up their residents, and how."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pie_vllm.errors import IntegrityError

if TYPE_CHECKING:
    from pie_vllm.policy.placement.residency import Residency


def make_free(residency: Residency, count: int) -> None:
    """Demote up to ``count`` blocks, as far as pooled ids are free."""
    victims = residency.victims
    count = min(count, residency.queue.available_pooled)
    while count > 0:
        victim = victims.private()
        if victim is None:
            break
        _demote(residency, victim.index, victim.block, (victim.request_id,))
        count -= 1
    if count <= 0:
        return
    for _, index, block in victims.rest():
        _demote(residency, index, block, victims.users(index, block))
        count -= 1
        if count <= 0:
            return


def _demote(residency: Residency, index: int, block: Any, users: Collection[str]) -> None:
    """Give a resident block of these requests a pooled id, and its KV a row."""
    if len(users) != block.ref_cnt:
        raise IntegrityError(
            f"block {block.block_id} has {block.ref_cnt} users, {len(users)} were found"
        )
    queue, parking = residency.queue, residency.parking
    target = queue.take_pooled()
    row, stored = parking.row_for(block, target.block_id)
    if not stored:
        parking.copies.stores[row] = block.block_id
    residency.demoted = True
    residency.clear_full(block.block_id)
    residency.relabel(index, block, target, users)
    for request_id in users:
        residency.reading.add(request_id, target.block_id)
    queue.prepend_n([block])
    residency.demotions += 1

"""Which pooled blocks get residents that are free."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pie_vllm.policy.placement.residency import Residency


def tail_room(running: int, block_size: int) -> int:
    """Residents that so many requests may ask for in a step, about: promotion leaves them alone."""
    return running // block_size + 2


def promote_free(
    residency: Residency, fresh: Collection[str], room: int, budget: int | None
) -> list[tuple[int, int]]:
    """Promote blocks of running requests, the first admitted first; returns resident and row.

    Args:
        residency: whose blocks.
        fresh: requests whose tables were sent already; theirs stay where they are.
        room: free residents to use.
        budget: blocks that the step may load; None is without end.
    """
    reading, victims = residency.reading, residency.victims
    spare = residency.window if budget is None else budget - reading.num_blocks
    copies: list[tuple[int, int]] = []
    for request_id in victims.holders:
        if room <= 0:
            break
        if request_id in fresh or not reading.pooled(request_id):
            continue
        runs = reading.runs(request_id)
        for index, block in enumerate(residency.tables[request_id]):
            if room <= 0:
                break
            if block.block_id < residency.boundary:
                continue
            if not runs and spare <= 0:
                break
            users = victims.users(index, block) if block.ref_cnt > 1 else (request_id,)
            if not any(user in fresh for user in users):
                copies.append(_promote(residency, index, block, users))
                room -= 1
                spare -= not runs  # A load that the step would do without.
    return copies


def _promote(
    residency: Residency, index: int, block: Any, users: Collection[str]
) -> tuple[int, int]:
    """Give a pooled block of these requests a free resident; the page and the row."""
    queue = residency.queue
    target = queue.popleft()
    residency.entries.drop(target)
    row = residency.rows.row_of(block.block_id)
    residency.parking.promoted(block)
    residency.relabel(index, block, target, users)
    for request_id in users:
        residency.reading.discard(request_id, block.block_id)
        residency.victims.offer_from(request_id, index)
    residency.set_full(target)
    queue.give_blank(block)
    residency.promotions += 1
    return target.block_id, row

"""Which pooled blocks get residents that are free."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pie_vllm.policy.plan import Copy
from pie_vllm.policy.runs import merge

if TYPE_CHECKING:
    from pie_vllm.policy.residency import Residency


def tail_room(running: int, block_size: int) -> int:
    """Residents that so many requests may ask for in a step, about: promotion leaves them alone."""
    return running // block_size + 2


def promote_free(
    residency: Residency, fresh: Collection[str], room: int, budget: int | None
) -> tuple[Copy, ...]:
    """Promote blocks of running requests, the first admitted first; returns the copies.

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
                copies.append(residency.promote(index, block, users))
                room -= 1
                spare -= not runs  # A load that the step would do without.
    return merge(copies, residency.geometry.chunk_rows)

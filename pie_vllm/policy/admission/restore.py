"""What KV of a request outlives its blocks, and how it gets blocks again.

A request that gives its blocks back leaves full blocks in the prefix cache, and the tail of a
preempted one in a row. When it is about to be admitted again, parked blocks get ids.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from pie_vllm.policy.placement.residency import Residency

LEAST_OF_LINK = 4
"""Divisor of the blocks that the link brings in a step; at least the quotient stays available for
restoring waiting requests."""


class ParkedKey(NamedTuple):
    """Stands for a parked block in a list of blocks."""

    key: Hashable


def restored_at_once(residency: Residency, most: int | None) -> int:
    """Blocks that the step can copy back to residents without keeping those waiting that run.

    Where pooled blocks take the link, a part of it is left all the same: a request that waits for
    its KV would wait as long as they are there.

    Args:
        residency: whose blocks.
        most: Maximum number of blocks that the link copies behind the step's compute; None for no
            bound.
    """
    if most is None:
        return residency.boundary
    return max(most - residency.read_set.num_blocks, most // LEAST_OF_LINK, 1)


def restore(residency: Residency, found: Sequence[Any], first: int, residents: int) -> list[Any]:
    """Give parked blocks ids, as cached blocks that nobody uses; returns ``found`` with these.

    Residents for the first of them, which the coming step fills; pooled ids for the others, of
    which enough must be free.

    Args:
        residency: whose blocks.
        found: blocks, and a ``ParkedKey`` for each parked one.
        first: index of the first of them in the request's table.
        residents: free ones to use, at most ``queue.free_residents``.
    """
    keys = [block.key for block in found if isinstance(block, ParkedKey)]
    # Before anything is evicted, which may take the rows of parked blocks.
    residency.parking.pin(keys[:residents])
    attached = {key: _attach(residency, key) for key in keys[residents:]}
    blocks: list[Any] = []
    for index, block in enumerate(found, first):
        if isinstance(block, ParkedKey):
            key = block.key
            block = attached.get(key) or _fill(residency, key)
            residency.entries.put(block, key, index)
            residency.queue.append(block)
        blocks.append(block)
    residency.withhold()
    return blocks


def restore_part(residency: Residency, found: Sequence[Any], first: int, most: int) -> None:
    """Give the first ``most`` of parked blocks residents, as cached blocks that nobody uses.

    The others keep their rows whatever this step evicts, and are as young as these after it.

    Args:
        residency: whose blocks.
        found: as ``restore``.
        first: as ``restore``.
        most: parked blocks, at most ``queue.free_residents``.
    """
    part = first_of(found, most)
    left = found[len(part) :]
    residency.parking.pin(block.key for block in left if isinstance(block, ParkedKey))
    restore(residency, part, first, most)


def first_of(found: Sequence[Any], parked: int) -> list[Any]:
    """The first of ``found``, with so many parked blocks."""
    for index, block in enumerate(found):
        if isinstance(block, ParkedKey):
            if not parked:
                return list(found[:index])
            parked -= 1
    return list(found)


def _attach(residency: Residency, key: Hashable) -> Any:
    """A pooled block whose row is that of the key."""
    parking = residency.parking
    place = parking.place_of(key)
    block = residency.queue.take_pooled(place, with_row=True)
    parking.attach(key, block.block_id)
    parking.places[block.block_id] = place
    return block


def _fill(residency: Residency, key: Hashable) -> Any:
    """A resident that the coming step fills from the row of the key, which is pinned."""
    block = residency.queue.popleft()
    residency.entries.drop(block)
    residency.parking.restore(key, block.block_id)
    residency.parking.places[block.block_id] = residency.parking.place_of(key)
    return block


def cancel(residency: Residency, blocks: Sequence[Any]) -> None:
    """Nobody takes these after all: residents that are not filled yet hold nothing again."""
    queue, restores = residency.queue, residency.parking.copies.restores
    for block in blocks:
        if block.ref_cnt == 0 and block.block_id in restores:
            queue.remove(block)
            del restores[block.block_id]
            residency.entries.drop(block)
            queue.prepend_n([block])


def forget_unfilled(residency: Residency, table: Sequence[Any], full: int) -> None:
    """Take blocks that hold no KV yet out of the prefix cache.

    vLLM caches a block in the step that fills it, before it runs
    (v1/core/kv_cache_manager.py:612): if the request is preempted in that very step, it is never
    filled.

    Args:
        residency: whose blocks.
        table: of the request.
        full: its blocks whose KV is complete.
    """
    for block in table[full:]:
        if block.ref_cnt == 1 and block.block_hash is not None:
            residency.entries.drop(block)


def keep_tail(
    residency: Residency, request_id: str, table: Sequence[Any], computed: int, block_size: int
) -> None:
    """Park the first block of a preempted request that the prefix cache does not know.

    Args:
        residency: whose blocks.
        request_id: of the request.
        table: its blocks.
        computed: its tokens whose KV is complete.
        block_size: tokens of a block.
    """
    index = next((i for i, b in enumerate(table) if b.block_hash is None), len(table))
    tokens = min(computed, (index + 1) * block_size)
    if tokens > index * block_size and table[index].block_id < residency.boundary:
        residency.parking.keep_tail(request_id, table[index], index, tokens)

"""What KV of a request outlives its blocks, and how it gets blocks again.

A request that gives its blocks back leaves full blocks in the prefix cache, or under its own name
if it is preempted and there is none, and the tail of a preempted one in a row. When it is about to
be admitted again, parked blocks get ids.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import takewhile
from operator import countOf, itemgetter
from typing import Any, NamedTuple

from pie_vllm.geometry import cdiv
from pie_vllm.policy.placement.residency import Residency

LEAST_OF_LINK = 4
"""Divisor of the blocks that the link brings in a step; at least the quotient stays available for
restoring waiting requests."""


class ParkedKey(NamedTuple):
    """Stands for a parked block in a list of blocks."""

    key: Hashable


_stand_in: Callable[[tuple[Hashable]], ParkedKey] = partial(tuple.__new__, ParkedKey)
_key_of: Callable[[Any], Hashable] = itemgetter(0)


def stand_ins(keys: Iterable[Hashable]) -> list[Any]:
    """A ``ParkedKey`` for each key, made in half the time."""
    return [*map(_stand_in, zip(keys))]


def num_parked(found: Sequence[Any]) -> int:
    """How many of these blocks and keys of parked ones are keys."""
    return countOf(map(type, found), ParkedKey)


def parked_keys(found: Sequence[Any]) -> list[Hashable]:
    """The keys of the parked ones among these; mostly all are."""
    if num_parked(found) == len(found):
        return [*map(_key_of, found)]
    return [one.key for one in found if isinstance(one, ParkedKey)]


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
    keys = parked_keys(found)
    # Before anything is evicted, which may take the rows of parked blocks.
    rows = residency.parking.pin(keys[:residents])
    attached = [_attach(residency, key) for key in keys[residents:]]
    given = [*_fill(residency, rows), *attached]
    blocks, places = given, [*range(first, first + len(found))]
    if len(keys) < len(found):
        indices = [index for index, block in enumerate(found) if isinstance(block, ParkedKey)]
        blocks, places = list(found), [first + index for index in indices]
        for index, block in zip(indices, given, strict=True):
            blocks[index] = block
    residency.entries.put_each(given, keys, places)
    residency.queue.append_n(given[::-1])  # The last one of a prefix is reused first.
    residency.supply.withhold()
    return blocks


def restore_part(residency: Residency, found: Sequence[Any], first: int, most: int) -> list[Any]:
    """Give the first ``most`` of parked blocks residents, as cached blocks that nobody uses.

    As many that follow are made young before anything is evicted, and come next. The other ones
    were made young when they were found.

    Args:
        residency: whose blocks.
        found: as ``restore``.
        first: as ``restore``.
        most: parked blocks, at most ``queue.free_residents``.

    Returns:
        The blocks of ``found`` up to the next one that is parked.
    """
    part = first_of(found, most)
    following = found[len(part) : len(part) + most]
    residency.parking.touch(parked_keys(following)[::-1])
    return restore(residency, part, first, most)


def first_of(found: Sequence[Any], parked: int) -> list[Any]:
    """The first of ``found``, with so many parked blocks."""
    near = found[: parked + 1]
    if num_parked(near) == len(near):
        return list(near[:parked])
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


def _fill(residency: Residency, rows: Sequence[int]) -> list[Any]:
    """Residents that the coming step fills from rows, which are pinned."""
    blocks = residency.queue.popleft_n(len(rows)) if rows else []
    residency.entries.drop_cached(blocks)
    residency.parking.restore(rows, [block.block_id for block in blocks])
    return blocks


def cancel(residency: Residency, blocks: Sequence[Any]) -> None:
    """Nobody takes these after all: residents that are not filled yet hold nothing again."""
    queue, restores = residency.queue, residency.parking.copies.restores
    for block in blocks:
        if block.ref_cnt == 0 and block.block_id in restores:
            queue.remove(block)
            del restores[block.block_id]
            residency.entries.drop(block)
            queue.prepend_n([block])


def forget_unfilled(residency: Residency, request_id: str, computed: int, block_size: int) -> None:
    """Take blocks that hold no KV yet, or not their state, out of the prefix cache.

    vLLM caches a block in the step that fills it, before it runs
    (v1/core/kv_cache_manager.py:612): if the request is preempted in that very step, it is never
    filled.

    Args:
        residency: whose blocks.
        request_id: of the request.
        computed: its tokens whose KV is complete.
        block_size: tokens of a block of the pooled group.
    """
    tables = [(residency.tables.get(request_id, ()), computed // block_size)]
    for group in residency.beside:
        full = group.needed(computed + 1).stop - 1  # The block of the next token is not full.
        tables.append((group.tables.get(request_id, ()), full))
    for table, full in tables:
        for block in table[full:]:
            if block.ref_cnt == 1 and block.block_hash is not None:
                residency.parking.watched.changed(block.block_hash)
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
        residency.parking.tails.keep_last(request_id, table[index], index, tokens)


def keep_whole(
    residency: Residency,
    request_id: str,
    table: Sequence[Any],
    computed: int,
    block_size: int,
    stores_max: int | None = None,
    *,
    spare_only: bool = False,
) -> bool:
    """Park what a request of a model with several groups of layers goes on with.

    These are the blocks of its windows and its state, and those of the pooled group that have no
    key. Its other full blocks are parked when they are evicted, as long as these are kept.

    Args:
        residency: whose blocks.
        request_id: of the request.
        table: its blocks of the pooled group.
        computed: its tokens whose KV is complete once the steps in flight are done. A state is one
            after just so many.
        block_size: tokens of a block of the pooled group.
        stores_max: maximum number of blocks that are stored for it; None for no bound.
        spare_only: whether KV of requests that come again is not given up for it.

    Returns:
        Whether all of it is parked; else nothing is.
    """
    full = table[: computed // block_size]
    keys = [*takewhile(lambda key: key is not None, (block.block_hash for block in full))]
    end = cdiv(computed, block_size)
    blocks: list[tuple[Any, int, int | None]] = [
        (block, index, None) for index, block in enumerate(table[len(keys) : end], len(keys))
    ]
    there = len(table) >= end
    for group in residency.beside:
        own, needed = group.tables.get(request_id, ()), group.needed(computed)
        there = there and needed.stop <= len(own)
        blocks += [(own[index], index, group.number) for index in needed if index < len(own)]
    there = there and not any(block.is_null for block, _, _ in blocks)
    if not there or (stores_max is not None and len(blocks) > stores_max):
        return False
    behind = computed - len(keys) * block_size
    tails = residency.parking.tails
    return tails.keep_whole(request_id, blocks, keys, computed, behind, spare_only=spare_only)


def push_out(residency: Residency, hits: Sequence[Any]) -> int:
    """Park the residents among a waiting request's blocks that nobody uses, and give them up.

    They hold the room that its windows and its state need. A step later they can have pooled ids.

    Returns:
        How many they were.
    """
    queue, parking, boundary = residency.queue, residency.parking, residency.boundary
    pushed = 0
    for block in hits:
        idle = block.ref_cnt == 0 and block.block_id < boundary
        if not idle or block.block_id in parking.copies.restores:
            continue
        if parking.parked(block.block_hash) or parking.keep(block):
            queue.remove(block)
            parking.watched.changed(block.block_hash)
            residency.entries.drop(block)
            queue.prepend_n([block])
            pushed += 1
    return pushed

"""TieredFreeBlockQueue: residents to allocation, pooled ids to demotion, counts always right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.placement import free_queue
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.simulation.prefix_cache import Free
from tests.helpers.fakes import FakeBlock

RESIDENT = 5
POOLED = 4


class Observer:
    """Demotes by handing a used resident back, as Residency does, and notes what it is told."""

    def __init__(self) -> None:
        self.queue: Any = None
        self.used: list[FakeBlock] = []
        self.pooled: list[FakeBlock] = []
        self.dropped: list[int] = []
        self.reused: list[int] = []
        self.freed: list[int] = []
        self.evicted: list[int] = []

    def make_residents_free(self, count: int) -> None:
        for _ in range(min(count, self.queue.available_pooled, len(self.used))):
            target = self.queue.take_pooled(0)
            target.ref_cnt = 1
            self.pooled.append(target)
            block = self.used.pop(0)
            block.ref_cnt = 0
            self.queue.demotable -= 1
            self.queue.prepend_n([block])

    def on_reused(self, blocks: Sequence[FakeBlock]) -> None:
        self.reused += [block.block_id for block in blocks]

    def on_residents_freed(self, blocks: Sequence[FakeBlock]) -> None:
        self.freed += [block.block_id for block in blocks]

    def on_evicted(self, blocks: Sequence[FakeBlock]) -> None:
        self.evicted += [block.block_id for block in blocks]

    def on_pooled_dropped(self, block: FakeBlock) -> None:
        self.dropped.append(block.block_id)


def make() -> tuple[TieredFreeBlockQueue, Observer, list[FakeBlock]]:
    observer = Observer()
    blocks = [FakeBlock(i) for i in range(RESIDENT + POOLED)]
    observer.queue = TieredFreeBlockQueue(blocks, RESIDENT, Free, observer)
    return observer.queue, observer, blocks


def use(queue: TieredFreeBlockQueue, observer: Observer, count: int) -> list[FakeBlock]:
    """Allocate blocks that are full at once."""
    taken = queue.popleft_n(count)
    for block in taken:
        block.ref_cnt = 1
    observer.used += taken
    queue.demotable += count
    queue.refresh()
    return taken


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=80))
def test_counts_and_lists_follow_a_model(operations: list[tuple[int, int]]) -> None:
    """After any operations each id is free once or in use, and the count is what can be had."""
    queue, observer, _ = make()
    idle: list[FakeBlock] = []
    for kind, pick in operations:
        if kind == 5:
            queue.withheld = pick % 4
            queue.refresh()
        can_be_had = queue.free_residents + min(queue.available_pooled, queue.demotable)
        assert queue.num_free_blocks == can_be_had
        if kind <= 1:
            wanted = pick % 3 + 1
            if wanted > can_be_had:
                with pytest.raises(ValueError, match="No free blocks"):
                    queue.popleft_n(can_be_had + 1)
                continue
            assert all(block.block_id < RESIDENT for block in use(queue, observer, wanted))
        elif kind == 2 and observer.used:
            block = observer.used.pop(pick % len(observer.used))
            block.ref_cnt = 0
            queue.demotable -= 1
            queue.prepend_n([block])
        elif kind == 3 and observer.pooled:
            block = observer.pooled.pop(pick % len(observer.pooled))
            block.ref_cnt = 0
            queue.append(block)
            idle.append(block)
        elif kind == 4 and idle:
            block = idle.pop(pick % len(idle))
            if block.block_id in {b.block_id for b in queue.get_all_free_blocks()} and not (
                queue.is_blank(block.block_id)
            ):
                queue.remove(block)
                block.ref_cnt = 1
                observer.pooled.append(block)
        elif kind == 5 and observer.pooled:
            block = observer.pooled.pop(pick % len(observer.pooled))
            block.ref_cnt = 0
            queue.prepend_n([block])
            assert queue.is_blank(block.block_id)
        idle = [b for b in idle if b not in observer.pooled and not queue.is_blank(b.block_id)]
        queue.check_integrity()
        used = len(observer.used) + len(observer.pooled)
        assert queue.free_in_all + used == RESIDENT + POOLED
    assert sorted(b.block_id for b in queue.get_all_free_blocks()) == sorted(
        set(range(RESIDENT + POOLED)) - {b.block_id for b in (*observer.used, *observer.pooled)}
    )


def test_allocation_never_hands_out_a_pooled_id() -> None:
    """New tokens are written into residents only, whatever is free in the other tier."""
    queue, observer, _ = make()
    assert [b.block_id for b in use(queue, observer, RESIDENT)] == list(range(RESIDENT))
    assert queue.num_free_blocks == POOLED
    assert all(block.block_id < RESIDENT for block in use(queue, observer, POOLED))
    assert queue.num_free_blocks == 0
    with pytest.raises(ValueError, match="No free blocks"):
        queue.popleft()


def test_only_as_many_can_be_had_as_can_be_demoted() -> None:
    """Free pooled ids do not count where nothing in use is full."""
    queue, _, _ = make()
    queue.popleft_n(RESIDENT)
    assert queue.free_pooled == POOLED
    assert queue.num_free_blocks == 0


def test_demotion_takes_blank_ids_first_then_the_oldest_idle_one() -> None:
    """Idle cached KV in the pool stays as long as there are blank ids, oldest dropped first."""
    queue, observer, blocks = make()
    taken = [queue.take_pooled(0) for _ in range(POOLED)]
    assert [b.block_id for b in taken] == list(range(RESIDENT, RESIDENT + POOLED))
    queue.append_n([blocks[RESIDENT + 2], blocks[RESIDENT]])
    queue.give_blank([blocks[RESIDENT + 1]])
    assert queue.take_pooled(0) is blocks[RESIDENT + 1]
    assert observer.dropped == []
    assert queue.take_pooled(0) is blocks[RESIDENT + 2]
    assert observer.dropped == [RESIDENT + 2]


def test_a_hit_on_an_idle_block_is_told_for_residents() -> None:
    """The policy learns that an idle resident is in use again; pooled ids need no telling."""
    queue, observer, blocks = make()
    queue.remove(blocks[1])
    assert observer.reused == [1]
    assert queue.free_residents == RESIDENT - 1


def test_admission_terms_apply_until_they_are_taken_back() -> None:
    """Hits are given back, the reserve is kept, both only while a waiting request is looked at."""
    queue, observer, _ = make()
    use(queue, observer, 3)
    assert queue.num_free_blocks == 2 + 3
    queue.admission(hits=1, reserve=3)
    assert queue.num_free_blocks == 2 + 1
    queue.admission()
    assert queue.num_free_blocks == 2 + 3


def test_a_walk_for_a_connector_is_refused() -> None:
    """KV connectors are refused at start; their walk of the queue must not work by chance."""
    queue, _, blocks = make()
    with pytest.raises(NotImplementedError, match="connector"):
        queue.iter_blocks_after(blocks[0])


def test_integrity_notices_a_block_in_use_among_the_free() -> None:
    """The check itself works."""
    queue, _, blocks = make()
    blocks[3].ref_cnt = 1
    with pytest.raises(IntegrityError, match="in use"):
        queue.check_integrity()


def test_withheld_ids_stay_blank_and_idle_ones_are_taken_in_their_place() -> None:
    """For want of memory no further row may be used, but one that is held may change hands."""
    queue, observer, _ = make()
    taken = [queue.take_pooled(0) for _ in range(2)]
    queue.withheld = 2
    queue.refresh()
    queue.append_n(taken)
    assert (queue.free_pooled, queue.available_pooled) == (4, 2)
    assert queue.take_pooled(0) is taken[0]
    assert observer.dropped == [taken[0].block_id]
    assert queue.available_pooled == 1
    queue.forget_cached_pooled()
    assert observer.dropped == [block.block_id for block in taken]
    assert queue.is_blank(taken[1].block_id)
    assert (queue.free_pooled, queue.available_pooled) == (3, 1)
    queue.check_integrity()


def test_freshened_blocks_are_reused_last() -> None:
    """What a waiting request hits is not taken for what it needs besides."""
    queue, observer, _ = make()
    order = [block.block_id for block in queue.get_all_free_blocks()][:RESIDENT]
    free = queue.num_free_blocks
    queue.freshen(queue.get_all_free_blocks()[:2])
    found = [block.block_id for block in queue.get_all_free_blocks()][:RESIDENT]
    assert found == [*order[2:], *order[:2]]
    assert queue.num_free_blocks == free
    assert not observer.reused
    assert not observer.freed
    queue.check_integrity()


def test_an_idle_cached_resident_is_told_of_before_it_is_reused() -> None:
    """What it caches may be kept elsewhere; blank ones are nobody's concern."""
    queue, observer, _ = make()
    cached = queue.get_all_free_blocks()[0]
    cached.block_hash = "content"
    taken = queue.popleft_n(2)
    assert taken[0] is cached
    assert observer.evicted == [cached.block_id]


def test_idle_ids_are_dropped_for_a_longer_gap_but_for_those_of_a_hit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a waiting request has found is not taken for what it needs besides."""
    monkeypatch.setattr(free_queue, "GAP_SHARE", 1)
    queue, observer, blocks = make()
    taken = [queue.take_pooled(10 * place) for place in range(POOLED)]
    queue.append_n(taken[1:])
    queue.give_blank(taken[:1])
    queue.freshen(taken[2:3])
    before = queue.num_free_blocks, queue.available_pooled
    assert queue.take_pooled(100) is blocks[RESIDENT], "the longest gap begins with it"
    dropped = [block.block_id for block in taken[1:] if block is not taken[2]]
    assert observer.dropped == dropped
    assert not queue.is_blank(taken[2].block_id)
    assert (queue.num_free_blocks, queue.available_pooled) == (before[0], before[1] - 1)
    queue.check_integrity()

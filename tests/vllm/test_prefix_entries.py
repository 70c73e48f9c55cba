"""Entries of vLLM's prefix cache, changed by pie's shorter ways, are as by vLLM's own methods."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from pie_vllm.errors import IntegrityError
from pie_vllm.vllm.scheduler_side.block_keys import findable_blocks, hash_keys
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool
from pie_vllm.vllm.scheduler_side.manager import PieBlockSpaceManager

pytestmark = pytest.mark.vllm

BLOCKS, SIZE = 24, 16
KEYS = [make_block_hash_with_group_id(bytes([n]) * 32, 0) for n in range(10)]


def entries(pool: Any) -> tuple[Any, ...]:
    """What the prefix cache knows, and what each block says of itself."""
    found = {}
    for key, blocks in pool.cached_block_hash_to_block._cache.items():
        found[key] = sorted(blocks) if isinstance(blocks, dict) else [blocks.block_id]
    second = {block: keys for block, keys in pool.cached_block_hashes_by_block.items() if keys}
    return found, second, [(b.block_hash, b.block_hash_num_tokens) for b in pool.blocks]


class Collector:
    """Counts what vLLM tells its collector of block metrics."""

    def __init__(self) -> None:
        self.evicted: list[int] = []

    def on_block_evicted(self, block: Any) -> None:
        self.evicted.append(block.block_id)


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_random_changes_leave_the_same_entries(seed: int, listening: bool) -> None:
    """Put, moved and dropped, with several blocks of one key and with second keys."""
    rng = random.Random(seed)
    pie, stock = (kind(BLOCKS, True, SIZE) for kind in (PieBlockPool, BlockPool))
    if listening:
        pie.metrics_collector, stock.metrics_collector = Collector(), Collector()
    manager: Any = SimpleNamespace(block_pool=pie, block_size=SIZE)
    for _ in range(200):
        cached = [b.block_id for b in stock.blocks if b.block_hash is not None]
        bare = [b.block_id for b in stock.blocks[1:] if b.block_hash is None]
        call = rng.choice(("put", "put", "put", "several", "move", "drop", "second"))
        if call == "put" and bare:
            one, key, index = rng.choice(bare), rng.choice(KEYS), rng.randrange(5)
            PieBlockSpaceManager._put_entry(manager, pie.blocks[one], key, index)
            stock._insert_block_hash(key, stock.blocks[one], (index + 1) * SIZE)
        elif call == "several":
            several = rng.sample(bare, rng.randint(0, min(4, len(bare))))
            keys, tokens = rng.choices(KEYS, k=len(several)), [SIZE * (i + 1) for i in several]
            pie.put_entries([pie.blocks[i] for i in several], keys, tokens)
            for i, key, count in zip(several, keys, tokens, strict=True):
                stock._insert_block_hash(key, stock.blocks[i], count)
        elif call == "move" and bare:
            one, other = rng.choice([*cached, bare[-1]]), rng.choice(bare)
            if one != other:
                pie.move_entry(pie.blocks[one], pie.blocks[other])
                stock.move_block_hashes(stock.blocks[one], stock.blocks[other])
        elif call == "drop":
            several = rng.sample(cached, rng.randint(0, min(4, len(cached))))
            pie.drop_entries([pie.blocks[i] for i in several])
            for i in several:
                stock._maybe_evict_cached_block(stock.blocks[i])
        elif call == "second" and cached and rng.random() < 0.1:
            one, key = rng.choice(cached), rng.choice(KEYS)
            for pool in (pie, stock):
                pool._insert_block_hash(key, pool.blocks[one], SIZE)
        assert entries(pie) == entries(stock)
        found = pie.cached(KEYS)
        each = map(stock.cached_block_hash_to_block.get_one_block, KEYS)
        assert [b and b.block_id for b in found] == [b and b.block_id for b in each]
    if listening:
        assert pie.metrics_collector.evicted == stock.metrics_collector.evicted


def full_pools() -> list[Any]:
    """Pie's pool and vLLM's own, with as plain a free queue."""
    pools: list[Any] = [kind(BLOCKS, True, SIZE) for kind in (PieBlockPool, BlockPool)]
    pools[0].by_request, pools[0].not_cached = False, set()
    return pools


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_requests_come_and_go_with_the_same_entries(seed: int, listening: bool) -> None:
    """Blocks taken, filled, some masked, null or with entries, and freed: the same ones each time.

    Prompts repeat, so that several blocks have one key.
    """
    rng = random.Random(seed)
    pools = full_pools()
    if listening:
        for pool in pools:
            pool.metrics_collector = SimpleNamespace(
                on_block_evicted=lambda _: None, on_block_allocated=lambda _: None
            )
    held: list[tuple[Any, ...]] = []
    most = 0
    for number in range(60):
        if held and rng.random() < 0.5:
            freed = held.pop(rng.randrange(len(held)))
            for pool, blocks in zip(pools, freed, strict=True):
                pool.free_blocks(blocks[::-1])
        count = rng.randint(0, 5)
        if count > pools[1].get_num_free_blocks():
            for pool in pools:
                with pytest.raises(ValueError, match="free blocks"):
                    pool.get_new_blocks(count)
            continue
        tables = [pool.get_new_blocks(count) for pool in pools]
        assert len({tuple(b.block_id for b in table) for table in tables}) == 1
        assert all(block.ref_cnt == 1 for table in tables for block in table)
        chain = rng.randrange(4)
        hashes = [bytes([chain, index]) * 16 for index in range(count)]
        request = SimpleNamespace(request_id=f"r{number}", block_hashes=hashes)
        cached = rng.randint(0, count)
        full, null, mask = rng.randint(cached, count), rng.random() < 0.2, None
        if rng.random() < 0.2:
            mask = [rng.random() < 0.5 for _ in range(full - cached)]
        for pool, table in zip(pools, tables, strict=True):
            shown = [pool.null_block, *table[1:]] if null and table else table
            pool.cache_full_blocks(request, shown, cached, full, SIZE, 0, mask)
        assert entries(pools[0]) == entries(pools[1])
        held.append(tuple(tables))
        most = max(most, len(pools[1].cached_block_hash_to_block))
    assert most > 2


def test_a_free_block_that_is_in_use_is_noticed() -> None:
    """As vLLM asserts it."""
    pool = full_pools()[0]
    pool.free_block_queue.get_all_free_blocks()[0].ref_cnt = 1
    with pytest.raises(IntegrityError, match="in use"):
        pool.get_new_blocks(1)


def test_keys_are_those_that_vllm_makes() -> None:
    """Of the full blocks behind the hits, the last token left out."""
    hashes = [bytes([n]) * 32 for n in range(5)]
    request: Any = SimpleNamespace(num_tokens=5 * SIZE, block_hashes=hashes)
    wanted = [make_block_hash_with_group_id(one, 0) for one in hashes[2:4]]
    assert [*hash_keys(request, 2, findable_blocks(request, SIZE, None))] == wanted
    assert [*hash_keys(request, 2, findable_blocks(request, SIZE, 3 * SIZE))] == wanted[:1]

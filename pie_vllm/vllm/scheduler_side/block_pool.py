"""vLLM's block pool over two tiers of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from operator import attrgetter
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.vllm.scheduler_side.block_keys import hash_keys

# Looked up once: ``super()`` costs as much as a call, and ``block_hash`` is a property.
_cache_stock = BlockPool.cache_full_blocks
_get_stock = BlockPool.get_new_blocks
_KEY = attrgetter("_block_hash")
_IS_NULL = attrgetter("is_null")
_USERS = attrgetter("ref_cnt")


class PieBlockPool(BlockPool):
    """vLLM's block pool whose free queue has two tiers.

    Attributes:
        residency: the policy that owns the tiers.
        not_cached: ids of requests whose blocks do not come into the prefix cache.
        by_request: whether blocks are found by their requests alone, without a prefix cache.
    """

    residency: Residency
    not_cached: set[str]
    by_request: bool

    def attach(self, residency: Residency) -> None:
        """Take the tiered queue in place of vLLM's; the null block stays id 0."""
        self.residency = residency
        self.not_cached = set()
        self.by_request = False
        self.free_block_queue = residency.queue
        null_block = residency.queue.popleft()
        assert null_block is self.null_block

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """As vLLM's, v1/core/block_pool.py:666, whose blocks lose their entries together.

        Raises:
            ValueError: So many cannot be had.
            IntegrityError: One of them is in use.
        """
        queue = self.free_block_queue
        if self._has_listeners or self._reuse_watchers or num_blocks > queue.num_free_blocks:
            return list(_get_stock(self, num_blocks))
        blocks: list[KVCacheBlock] = queue.popleft_n(num_blocks)
        if any(map(_USERS, blocks)):
            raise IntegrityError("a free block is in use")
        if self.enable_caching:
            self.drop_entries([block for block in blocks if block._block_hash is not None])
        for block in blocks:
            block.ref_cnt = 1
        return blocks

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """As vLLM's, v1/core/block_pool.py:752, with one change of the free queue for all."""
        nulls = [block for block in blocks if block.is_null]
        if nulls:  # vLLM 0.32 counts their uses, here and where they are freed, 0.33 does not.
            super().touch(nulls)
            blocks = [block for block in blocks if not block.is_null]
        idle = [block for block in blocks if block.ref_cnt == 0]
        if idle:
            self.free_block_queue.remove_n(idle)
        for block in blocks:
            block.ref_cnt += 1
        if self.metrics_collector:
            for block in blocks:
                self.metrics_collector.on_block_accessed(block)

    def cached(self, keys: Sequence[Any]) -> list[Any]:
        """The blocks of keys in the prefix cache; a reset of the cache makes a new map."""
        cache = self.cached_block_hash_to_block
        blocks = [*map(cache._cache.get, keys)]
        # A key has a dict of blocks where several hold its KV.
        return [*map(cache.get_one_block, keys)] if dict in map(type, blocks) else blocks

    def cached_first(self, keys: Sequence[Any]) -> list[Any]:
        """The blocks of the first keys in the prefix cache, up to one that is not in it."""
        return [*takewhile(lambda block: block is not None, self.cached(keys))]

    def drop_entries(self, blocks: Sequence[KVCacheBlock]) -> None:
        """As ``_maybe_evict_cached_block``, v1/core/block_pool.py:729, for each cached block.

        In a third of the time where nobody listens to evictions and no block has a second key.
        """
        if self._has_listeners:
            for block in blocks:
                self._maybe_evict_cached_block(block)
            return
        cache = self.cached_block_hash_to_block
        known = cache._cache
        for block in blocks:
            key = block._block_hash
            if known.get(key) is block:
                del known[key]
            else:  # Several blocks hold its KV.
                cache.pop(key, block.block_id)
            block._block_hash = block._block_hash_num_tokens = None

    def put_entries(
        self, blocks: Sequence[KVCacheBlock], keys: Sequence[Any], tokens: Sequence[int]
    ) -> None:
        """As ``_insert_block_hash``, v1/core/block_pool.py:626, for blocks without a key.

        Args:
            blocks: None of them has an entry.
            keys: Of each.
            tokens: Number of tokens of a request up to the end of each.
        """
        cache = self.cached_block_hash_to_block
        known = cache._cache
        for block, key, count in zip(blocks, keys, tokens, strict=True):
            block._block_hash, block._block_hash_num_tokens = key, count
            if key in known:
                cache.insert(key, block)
            else:
                known[key] = block

    def move_entry(self, source: KVCacheBlock, target: KVCacheBlock) -> None:
        """As ``move_block_hashes``, v1/core/block_pool.py:648; a third of the time, as above."""
        if self._has_listeners:
            self.move_block_hashes(source, target)
            return
        key, tokens = source._block_hash, source._block_hash_num_tokens
        if key is None:
            return
        source._block_hash = source._block_hash_num_tokens = None
        cache = self.cached_block_hash_to_block
        known = cache._cache
        if known.get(key) is source:
            known[key] = target
        elif cache.pop(key, source.block_id) is None:
            return
        else:  # Several blocks hold its KV.
            cache.insert(key, target)
        target._block_hash, target._block_hash_num_tokens = key, tokens

    @property
    def _has_listeners(self) -> bool:
        """Whether somebody hears of evictions, or a block has a second key."""
        others = self.metrics_collector or self.cached_block_hashes_by_block
        return bool(others or self.enable_kv_cache_events)

    def get_usage(self) -> float:
        """Share of all blocks, resident and pooled, that requests use."""
        blocks = self.num_gpu_blocks - 1
        return 1.0 - self.free_block_queue.free_in_all / blocks if blocks else 0.0

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, provided that no request holds blocks."""
        queue = self.free_block_queue
        # vLLM counts as used what is not free; here all of both tiers counts.
        queue.num_free_blocks = queue.free_in_all
        try:
            done = bool(super().reset_prefix_cache())
        finally:
            queue.refresh()
        if done:
            self.residency.forget_idle()
        return done

    def forget_cached(self) -> bool:
        """Take all blocks out of the prefix cache, those in use too; costs a pass over them.

        Returns:
            Whether there were any.
        """
        if not len(self.cached_block_hash_to_block):
            return False
        self.evict_blocks({b.block_id for b in self.blocks if b.block_hash is not None})
        return True

    def cache_full_blocks(
        self,
        request: Any,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """As vLLM's, v1/core/block_pool.py:226, but for requests that are not cached.

        Blocks without entries, as most are, get theirs together: a third of vLLM's time. Each
        request comes here for each block that it fills: ``allocate_slots`` of the manager
        says why the arguments are written out.
        """
        if self.by_request or request.request_id in self.not_cached:
            return
        new = blocks[num_cached_blocks:num_full_blocks]
        plain = block_mask is None and block_size == self.hash_block_size
        if plain and not (self._has_listeners or any(map(_KEY, new)) or any(map(_IS_NULL, new))):
            keys = [*hash_keys(request, num_cached_blocks, num_full_blocks, kv_cache_group_id)]
            first = (num_cached_blocks + 1) * block_size
            tokens = range(first, first + len(new) * block_size, block_size)
            self.put_entries(new, keys, tokens)
            return
        _cache_stock(
            self,
            request,
            blocks,
            num_cached_blocks,
            num_full_blocks,
            block_size,
            kv_cache_group_id,
            block_mask,
        )

    def cache_partial_block(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, v1/core/block_pool.py:449, but for requests that are not cached."""
        if self.by_request or request.request_id in self.not_cached:
            return None
        return super().cache_partial_block(request, *args, **kwargs)


class NotingBlockPool:
    """A block pool for a group whose new blocks are written to without regard to copies.

    Layers without a gate, and the zeroing of new blocks, may write to a page at any time in a
    step. It is vLLM's pool otherwise.
    """

    def __init__(self, pool: PieBlockPool) -> None:
        """In front of this pool."""
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """As vLLM's, v1/core/block_pool.py:666, and the residency hears of the blocks."""
        blocks: list[KVCacheBlock] = self._pool.get_new_blocks(num_blocks)
        self._pool.residency.planner.written_without_gate(blocks)
        return blocks

"""vLLM's block pool over two tiers of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from pie_vllm.policy.placement.residency import Residency


class PieBlockPool(BlockPool):
    """vLLM's block pool whose free queue has two tiers.

    Attributes:
        residency: the policy that owns the tiers.
        not_cached: ids of requests whose blocks do not come into the prefix cache.
    """

    residency: Residency
    not_cached: set[str]

    def attach(self, residency: Residency) -> None:
        """Take the tiered queue in place of vLLM's; the null block stays id 0."""
        self.residency = residency
        self.not_cached = set()
        self.free_block_queue = residency.queue
        null_block = residency.queue.popleft()
        assert null_block is self.null_block

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """As vLLM's, v1/core/block_pool.py:752, with one change of the free queue for all."""
        idle = [block for block in blocks if block.ref_cnt == 0 and not block.is_null]
        if idle:
            self.free_block_queue.remove_n(idle)
        for block in blocks:
            block.ref_cnt += 1
        if self.metrics_collector:
            for block in blocks:
                self.metrics_collector.on_block_accessed(block)

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

    def cache_full_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, v1/core/block_pool.py:226, but for requests that are not cached."""
        if request.request_id not in self.not_cached:
            super().cache_full_blocks(request, *args, **kwargs)

    def cache_partial_block(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, v1/core/block_pool.py:449, but for requests that are not cached."""
        if request.request_id in self.not_cached:
            return None
        return super().cache_partial_block(request, *args, **kwargs)

"""vLLM's block pool over two tiers of blocks."""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool

from pie_vllm.policy.residency import Residency


class PieBlockPool(BlockPool):
    """vLLM's block pool whose free queue has two tiers."""

    residency: Residency

    def attach(self, residency: Residency) -> None:
        """Take the tiered queue in place of vLLM's; the null block stays id 0."""
        self.residency = residency
        self.free_block_queue = residency.queue
        null_block = residency.queue.popleft()
        assert null_block is self.null_block

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

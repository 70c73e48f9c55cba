"""vLLM's KV cache manager over two tiers of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.request import Request, RequestStatus

from pie_vllm.errors import UnsupportedError
from pie_vllm.policy.completions import Completions
from pie_vllm.policy.geometry import Geometry
from pie_vllm.policy.residency import Residency
from pie_vllm.vllm import compat


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
            return bool(super().reset_prefix_cache())
        finally:
            queue.refresh()


class Claims(NamedTuple):
    """What running requests still need of the residents, beyond the blocks they have.

    Attributes:
        prompts: whether one of them has prompt chunks left.
        tails: how many will ask for a block though this step gave them none.
    """

    prompts: bool = False
    tails: int = 0


class PieBlockSpaceManager(KVCacheManager):
    """vLLM's KV cache manager over resident and pooled blocks.

    Attributes:
        residency: the policy that owns tiers, ledger and relocation.
        chunk_blocks: blocks that one step may fill with prompt tokens.
        claims: asks the scheduler what running requests still need; asked once
            a step, when a waiting request is looked at.
    """

    watermark_blocks: int

    def __init__(self, *args: Any, geometry: Geometry, chunk_blocks: int, **kwargs: Any) -> None:
        """As vLLM's manager, over ``geometry.num_blocks`` blocks."""
        with compat.own_block_pool(PieBlockPool):
            super().__init__(*args, **kwargs)
        managers = self.coordinator.single_type_managers
        if len(managers) != 1 or self.block_pool.num_gpu_blocks != geometry.num_blocks:
            raise UnsupportedError(
                f"--block-manager pie needs one KV cache group of {geometry.num_blocks} blocks, "
                f"vLLM made {len(managers)} of {self.block_pool.num_gpu_blocks}."
            )
        pool = self.block_pool
        self.geometry = geometry
        self.residency = Residency(
            geometry,
            pool.blocks,
            FreeKVCacheBlockQueue,
            managers[0].req_to_blocks,
            pool.move_block_hashes,
            pool._maybe_evict_cached_block,
        )
        pool.attach(self.residency)
        self.block_size = managers[0].block_size
        self.completions = Completions(self.block_size, self.residency)
        self.chunk_blocks = chunk_blocks
        self.claims: Callable[[], Claims] = Claims
        self._claims: Claims | None = None
        self._kept_back = 0

    def begin_step(self, limit: int, most: int) -> None:
        """Before ``Scheduler.schedule``: set this step's admission limit.

        As vLLM's watermark it applies to waiting and preempted requests only,
        and only while something runs, so it can neither preempt nor deadlock.
        Not through the watermark itself: vLLM also holds that against the
        blocks that can be had at once, which are fewer than those of both tiers.

        Args:
            limit: pooled blocks in use beyond which no waiting request is
                admitted. What is pooled beyond it has the first call on free
                residents.
            most: blocks that the running requests may take in this step.
        """
        self._claims = None
        self._kept_back = self.geometry.pooled_blocks - limit
        if self.residency.queue.num_free_blocks < most:
            self.completions.catch_up()

    def get_computed_blocks(self, request: Request, *args: Any) -> tuple[KVCacheBlocks, int, int]:
        """As vLLM's, which asks this of a waiting request just before it allocates for it.

        The next ``allocate_slots`` is then ``_admit``. Running requests call
        vLLM's own method without a detour: there are hundreds of them a step. (``args``: 0.33
        passes the longest hit allowed.)
        """
        self.allocate_slots = self._admit
        return super().get_computed_blocks(request, *args)  # type: ignore[no-any-return]

    def _admit(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        has_scheduled_reqs: bool = True,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """As vLLM's ``allocate_slots``, with the terms of waiting requests corrected.

        The request's idle prefix hits are not counted as residents, the whole
        sequence must fit both tiers together, and residents that running
        requests still need are left alone: for the chunks of prompts under way,
        and for those left out of this step at the end of a block.
        """
        del self.allocate_slots
        if new_computed_blocks is None:  # vLLM passed the waiting request over
            return super().allocate_slots(
                request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens
            )
        residency, queue = self.residency, self.residency.queue
        hits = new_computed_blocks.blocks[0]
        computed = request.num_computed_tokens + num_new_computed_tokens
        tokens = request.num_tokens if full_sequence_must_fit else computed + num_new_tokens
        if (full_sequence_must_fit or self._kept_back) and not self._fits(
            request, tokens, new_computed_blocks, computed, has_scheduled_reqs
        ):
            return None
        self.completions.catch_up()
        partial = computed + num_new_tokens < request.num_tokens
        if self._claims is None:
            self._claims = self.claims()
        reserve = self._claims.tails
        if has_scheduled_reqs and (partial or self._claims.prompts):
            reserve += self.chunk_blocks + 1
        residency.admit(request.request_id, len(hits))
        queue.admission(sum(block.ref_cnt == 0 for block in hits), reserve)
        try:
            blocks = super().allocate_slots(
                request,
                num_new_tokens,
                num_new_computed_tokens=num_new_computed_tokens,
                new_computed_blocks=new_computed_blocks,
                num_lookahead_tokens=num_lookahead_tokens,
                has_scheduled_reqs=has_scheduled_reqs,
                **kwargs,
            )
        finally:
            queue.admission()
        if blocks is None:
            residency.forget(request.request_id)
            return None
        residency.admitted(request.request_id)
        if partial:
            self._claims = self._claims._replace(prompts=True)
        return blocks

    def _fits(
        self,
        request: Request,
        tokens: int,
        hits: KVCacheBlocks,
        computed: int,
        has_scheduled_reqs: bool,
    ) -> bool:
        """Check as vLLM does that a waiting request's tokens fit, over both tiers, with the limit.

        Relies on the first check of ``KVCacheManager.allocate_slots``,
        v1/core/kv_cache_manager.py:515-540.
        """
        tokens = min(tokens, self.max_model_len)
        needed = self.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=tokens,
            new_computed_blocks=hits.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=min(computed, self.max_model_len),
            num_local_computed_tokens=computed,
            num_tokens_main_model=tokens,
            apply_admission_cap=True,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        waiting = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        if has_scheduled_reqs and request.status in waiting:
            needed += self.watermark_blocks + self._kept_back
        return bool(needed <= self.residency.queue.available_in_all)

    def free(self, request: Request) -> None:
        """Give a request's blocks back to their tiers."""
        self.residency.forget(request.request_id)
        super().free(request)

"""vLLM's KV cache manager over two tiers of blocks."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.request import Request, RequestStatus

from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.policy.admission.lookup import ParkedHits
from pie_vllm.policy.admission.transaction import Admission, Candidate
from pie_vllm.policy.placement.interfaces import PrefixEntries
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.vllm.compat import engine_core
from pie_vllm.vllm.scheduler_side.block_keys import keys_behind
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool
from pie_vllm.vllm.scheduler_side.hit_counts import HitCounts
from pie_vllm.vllm.scheduler_side.stale_kv import StaleKv

# Looked up once: an attribute of an enumeration and ``super()`` cost as much as the call itself.
_RUNNING = RequestStatus.RUNNING
_allocate_stock = KVCacheManager.allocate_slots


class PieBlockSpaceManager(KVCacheManager):
    """vLLM's KV cache manager over resident and pooled blocks.

    It translates: who is admitted, and with what of its KV, ``Admission`` decides; where blocks
    live, ``Residency``.

    Attributes:
        geometry: Sizes of the tiers.
        residency: Policy that owns tiers, rows and relocation.
        admission: Policy that decides about waiting requests.
        hit_counts: What admitted requests found in the prefix cache.
        stale: Keeps KV of old weights out of prefix cache and pool.
    """

    def __init__(
        self,
        *args: Any,
        geometry: Geometry,
        parking: str | None = None,
        watermark: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """As vLLM's manager, over ``geometry.num_blocks`` blocks.

        Args:
            args: vLLM's.
            geometry: the sizes.
            parking: policy of eviction of parked KV; None parks nothing, as where there is no
                prefix caching.
            watermark: vLLM's, which ``Admission`` holds against both tiers. vLLM's own manager
                gets 0, because it would hold it against what can be had at once.
            kwargs: vLLM's.
        """
        with engine_core.own_block_pool(PieBlockPool):
            super().__init__(*args, watermark=0.0, **kwargs)
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
            PrefixEntries(pool.move_block_hashes, pool._maybe_evict_cached_block, self._put_entry),
            parking if self.enable_caching else None,
        )
        pool.attach(self.residency)
        self.stale = StaleKv(self.residency, pool)
        self.block_size = managers[0].block_size
        self.admission = Admission(self.residency, self._cached, self.block_size, watermark)
        self.hit_counts = HitCounts(geometry.resident_blocks)
        self.admission.on_restored_ahead = self.hit_counts.ahead
        self._parked: dict[str, ParkedHits] = {}  # Of the request asked for last.

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int]:
        """As vLLM's, with what is parked behind its hits.

        Args:
            request: waiting.
            max_cache_hit_length: tokens that may be hit at most, given by 0.33 where outputs
                beside the KV are kept by block: a hit then ends with a block, too. None is all
                but the last.
        """
        self._parked.clear()
        cap = () if max_cache_hit_length is None else (max_cache_hit_length,)
        if not self.prefix_cache_lookup_enabled(request):
            blocks, tokens, boundary = super().get_computed_blocks(request, *cap)
            return blocks, tokens, boundary
        # Hashes are chained: the last one stands for all.
        state = (request.num_tokens, *cap, *request.block_hashes[-1:])
        hits: Any = self.admission.recall(request.request_id, state)
        boundary, known = 0, hits is not None  # There is one with windows or states only.
        if not known:
            found, _, boundary = super().get_computed_blocks(request, *cap)
            hits = found.blocks[0]
        parked = self.admission.find_parked(
            request.request_id,
            request.num_tokens,
            keys_behind(request, len(hits), self.block_size, max_cache_hit_length),
            hits,
            with_tail=max_cache_hit_length is None,
            state=state,
        )
        blocks = self.create_kv_cache_blocks((hits,)) if known else found
        if parked is None:
            return blocks, len(hits) * self.block_size, boundary
        self._parked[request.request_id] = parked
        return blocks, parked.tokens, boundary

    def _cached(self, key: Any) -> Any:
        """The block of a key in the prefix cache; a reset of the cache makes a new map."""
        return self.block_pool.cached_block_hash_to_block.get_one_block(key)

    def _put_entry(self, block: Any, key: Any, index: int) -> None:
        self.block_pool._insert_block_hash(key, block, (index + 1) * self.block_size)

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """As vLLM's; who does not run yet is admitted on pie's terms.

        The request's own status says who that is, whatever way it came here: new, preempted, or a
        streaming session that goes on with the blocks it has, for which vLLM looks up no prefix.
        There are hundreds of running requests a step, so they pass at once.
        """
        if request.status is _RUNNING:
            return _allocate_stock(self, request, *args, **kwargs)
        return self._admit(request, *args, **kwargs)

    def _admit(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        *,
        num_external_computed_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        has_scheduled_reqs: bool = True,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """As vLLM's ``allocate_slots``, on the terms of ``Admission``.

        They take the place of vLLM's first check, that of the whole sequence,
        v1/core/kv_cache_manager.py:515-540 in 0.32.
        """
        found = self.empty_kv_cache_blocks if new_computed_blocks is None else new_computed_blocks
        hits = found.blocks[0]
        parked = self._parked.pop(request.request_id, None)
        if parked is None:
            parked = ParkedHits.none(num_new_computed_tokens)
        computed = request.num_computed_tokens
        step_end = computed + num_new_computed_tokens + num_new_tokens
        candidate = Candidate(
            request.request_id,
            request.num_tokens,
            computed,
            hits,
            parked,
            num_new_tokens,
            min(request.num_tokens if full_sequence_must_fit else step_end, self.max_model_len),
            whole=full_sequence_must_fit,
            beside=has_scheduled_reqs,
        )
        transaction = self.admission.prepare(candidate)
        if transaction is None:
            return None
        if parked.parked:
            found = self.create_kv_cache_blocks((transaction.hits,))
        with transaction:
            blocks = super().allocate_slots(
                request,
                num_new_tokens,
                num_new_computed_tokens=parked.full_tokens,
                new_computed_blocks=found,
                num_lookahead_tokens=num_lookahead_tokens,
                num_external_computed_tokens=num_external_computed_tokens + parked.tail_tokens,
                has_scheduled_reqs=has_scheduled_reqs,
                **kwargs,
            )
        if blocks is None:
            transaction.roll_back()
            return None
        transaction.commit()
        if not transaction.goes_on:
            self.hit_counts.count(request.request_id, transaction.hits, parked)
        return blocks

    def free(self, request: Request) -> None:
        """Give a request's blocks back to their tiers; keep the tail of a preempted one."""
        request_id, finished = request.request_id, request.is_finished()
        computed = min(request.num_computed_tokens, request.num_tokens)
        reusable = not self.stale.holds_old_kv(request_id)
        if finished:
            self.hit_counts.forget(request_id)
        elif reusable and self.residency.tables.get(request_id):
            self.hit_counts.preempted(request_id, computed)
        self.admission.releases(request_id, computed, finished=finished, reusable=reusable)
        super().free(request)
        self.stale.freed(request)

    def pop_blocks_for_free(self, request: Request) -> Any:
        """Not offered: the blocks would be in use without a request that holds them.

        vLLM's scheduler takes them out where a KV connector may still write to them
        (``defer_block_free``), and connectors are refused.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"--block-manager pie cannot defer giving back the blocks of {request.request_id}: no "
            "tier would know who holds them. vLLM does so for KV connectors; remove "
            "--kv-transfer-config, or use --block-manager default."
        )

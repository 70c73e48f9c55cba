"""vLLM's KV cache manager over two tiers of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.request import Request, RequestStatus

from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry, cdiv
from pie_vllm.policy.admission.chunk import PROMPT_RESERVE, promised
from pie_vllm.policy.admission.leaving import forget_unfilled, keep_tail
from pie_vllm.policy.admission.lookup import ParkedHits, Room
from pie_vllm.policy.admission.restore import cancel, restore, restore_part, restored_at_once
from pie_vllm.policy.admission.waits import Patience, short_at_once, short_of
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.completed_blocks import Completions
from pie_vllm.policy.placement.interfaces import PrefixEntries
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.vllm.compat import engine_core
from pie_vllm.vllm.scheduler_side.block_keys import ParkedLookup
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool
from pie_vllm.vllm.scheduler_side.hit_counts import Admissions
from pie_vllm.vllm.scheduler_side.stale_kv import StaleKv


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
        chunk_blocks: blocks that prompts may fill in this step; the scheduler decides it.
        prompt_reserve: blocks that waiting requests leave to prompts under way.
        claims: asks the scheduler what running requests still need; asked once
            a step, when a waiting request is looked at.
        admissions: what they found in the prefix cache.
        stale: keeps KV of old weights out of prefix cache and pool.
        refused: why a waiting request was refused in this step, one of ``waits.REASONS``.
        watermark: share of the blocks in both tiers that an admission leaves free.
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
            watermark: vLLM's, which is held against both tiers here (``_headroom``). vLLM's own
                manager gets 0, because it would hold it against what can be had at once.
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
        self.watermark = watermark
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
        self._lookup = ParkedLookup(self.residency, pool, self.block_size)
        self._parked: dict[str, ParkedHits] = {}  # Of the request asked for last.
        self._decision = Decision(
            load_blocks_max=0,
            pooled_admission_max=geometry.pooled_blocks,
            spare_load_blocks_max=0,
        )
        self.admissions = Admissions(geometry.resident_blocks)
        self.completions = Completions(self.block_size, self.residency)
        self.chunk_blocks = geometry.resident_blocks
        self.prompt_reserve = PROMPT_RESERVE
        self.claims: Callable[[], Claims] = Claims
        self._claims: Claims | None = None
        self._kept_back = 0
        self.refused: str | None = None
        self._patience = Patience()

    def begin_step(self, decision: Decision, most: int) -> None:
        """Before ``Scheduler.schedule``: set this step's terms of admission.

        The limit applies as vLLM's watermark does, to waiting and preempted requests only and
        only while something runs, so it can neither preempt nor deadlock. What is pooled beyond it
        has the first call on free residents.

        Args:
            decision: for the step.
            most: blocks that the running requests may take in this step.
        """
        self._claims = self.refused = None
        self._decision = decision
        self._kept_back = self.geometry.pooled_blocks - decision.pooled_admission_max
        if self.residency.queue.num_free_blocks < most:
            self.completions.catch_up()

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
        cap = () if max_cache_hit_length is None else (max_cache_hit_length,)
        blocks, tokens, boundary = super().get_computed_blocks(request, *cap)
        self._parked.clear()
        parking = self.residency.parking
        if (
            parking.any
            and self._decision.restore_enabled
            and self.prefix_cache_lookup_enabled(request)
        ):
            hits = blocks.blocks[0]
            parked = self._lookup.find(request, hits, self._room(), max_cache_hit_length)
            if parked is not None:
                self._parked[request.request_id] = parked
                tokens = parked.tokens
        return blocks, tokens, boundary

    def _room(self) -> Room:
        """What a waiting request may use of the blocks that are free."""
        queue, claims = self.residency.queue, self._claimed()
        kept = claims.tails + (self.prompt_reserve if claims.prompts else 0)
        pooled = queue.available_pooled - self._kept_back
        return Room(queue.free_residents - kept, pooled, self.chunk_blocks)

    def _claimed(self) -> Claims:
        if self._claims is None:
            self._claims = self.claims()
        return self._claims

    def _put_entry(self, block: Any, key: Any, index: int) -> None:
        self.block_pool._insert_block_hash(key, block, (index + 1) * self.block_size)

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """As vLLM's; who does not run yet is admitted on pie's terms.

        The request's own status says who that is, whatever way it came here: new, preempted, or a
        streaming session that goes on with the blocks it has, for which vLLM looks up no prefix.
        There are hundreds of running requests a step, so they pass at once.
        """
        if request.status is RequestStatus.RUNNING:
            return super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        return self._admit(request, num_new_tokens, *args, **kwargs)

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
        """As vLLM's ``allocate_slots``, with the terms of waiting requests corrected.

        The request's idle prefix hits are not counted as residents, the whole
        sequence must fit both tiers together, and residents that running
        requests still need are left alone: for the chunks of prompts under way,
        and for those left out of this step at the end of a block. What was found
        parked gets its blocks here.
        """
        request_id = request.request_id
        if new_computed_blocks is None:
            new_computed_blocks = self.empty_kv_cache_blocks
        goes_on = request_id in self.residency.victims.holders
        residency, queue = self.residency, self.residency.queue
        hits, parked = new_computed_blocks.blocks[0], self._parked.pop(request_id, None)
        if parked is None:
            parked = ParkedHits.none(num_new_computed_tokens)
        elif parked.cut and has_scheduled_reqs and self._may_wait(request):
            return None  # There will be room once others are done.
        cached = request.num_computed_tokens + len(hits) * self.block_size
        computed = request.num_computed_tokens + num_new_computed_tokens
        tokens = request.num_tokens if full_sequence_must_fit else computed + num_new_tokens
        beyond_chunk = full_sequence_must_fit or self._kept_back or self.watermark
        if beyond_chunk and not self._fits(
            request, tokens, new_computed_blocks, cached, has_scheduled_reqs
        ):
            return None
        self.completions.catch_up()
        partial = computed + num_new_tokens < request.num_tokens
        claims = self._claimed()
        prompts = has_scheduled_reqs and (partial or claims.prompts)
        reserve = promised(queue, claims.tails, self.prompt_reserve if prompts else 0)
        most = restored_at_once(residency, self._decision.restore_blocks_max)
        if has_scheduled_reqs and parked.residents > most and self._may_wait(request):
            restore_part(residency, parked.found, len(hits), most)
            self.admissions.ahead(request_id, most)
            return None
        if parked.parked:
            hits = [*hits, *restore(residency, parked.found, len(hits), parked.residents)]
            new_computed_blocks = self.create_kv_cache_blocks((hits,))
        tail = None
        if parked.tail_tokens:
            tail = residency.parking.tails.take(request_id)
            residency.withhold()
        residency.admit(request_id, len(hits))
        # Restored residents are free blocks that the request takes: vLLM counts them rightly.
        idle = sum(block.ref_cnt == 0 for block in hits) - parked.residents
        queue.admission(idle, reserve)
        try:
            blocks = super().allocate_slots(
                request,
                num_new_tokens,
                num_new_computed_tokens=parked.full_tokens,
                new_computed_blocks=new_computed_blocks,
                num_lookahead_tokens=num_lookahead_tokens,
                num_external_computed_tokens=num_external_computed_tokens + parked.tail_tokens,
                has_scheduled_reqs=has_scheduled_reqs,
                **kwargs,
            )
            if blocks is None:
                used = sum(block.ref_cnt > 0 for block in hits)
                used += len(residency.tables.get(request_id, ()))
                total = cdiv(computed + num_new_tokens, self.block_size)
                self.refused = short_at_once(queue, total - used)
        finally:
            queue.admission()
        if blocks is None:
            if not goes_on:
                residency.forget(request_id)
            cancel(residency, hits)
            if tail is not None:
                residency.parking.tails.put_back(request_id, tail)
            residency.withhold()
            return None
        self._patience.forget(request_id)
        if not goes_on:
            residency.admitted(request_id)
            self.admissions.count(request_id, hits, parked)
        if tail is not None:
            block = residency.tables[request_id][len(hits)]
            residency.parking.tails.restore(tail, block.block_id)
        elif residency.parking.tails:
            residency.parking.tails.drop(request_id)
        if partial:
            self._claims = claims._replace(prompts=True)
        return blocks

    def _may_wait(self, request: Request) -> bool:
        """Whether a request waits for its parked KV in this step."""
        if not self._patience.wait(request.request_id, cdiv(request.num_tokens, self.block_size)):
            return False
        self.refused = "restore"
        return True

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
        queue = self.residency.queue
        within, headroom = queue.available_in_all, 0
        if has_scheduled_reqs:
            # Rows that are on their way count: the schedule waits for them.
            there = queue.available_in_all - queue.free_residents
            pooled = min(there, queue.free_pooled - self._kept_back)
            within, headroom = queue.free_residents + pooled, self._headroom()
        if needed + headroom <= within:
            return True
        self.refused = short_of(queue, needed, within)
        return False

    def _headroom(self) -> int:
        """Blocks of both tiers that the watermark has an admission leave free.

        A share of the blocks that requests may use now, without pooled ids beyond the limit or
        without CPU memory. It leaves to use no less than the same share of the blocks that the
        device's bytes would hold without a ring, which is what it would be without pie.
        """
        if not self.watermark:
            return 0
        geometry, missing = self.geometry, self.residency.queue.missing
        usable = geometry.num_blocks - min(geometry.pooled_blocks, max(missing, self._kept_back))
        device = geometry.device_bytes // geometry.row_bytes
        device_used = device - int(self.watermark * device)
        return max(0, min(int(self.watermark * usable), usable - device_used))

    def free(self, request: Request) -> None:
        """Give a request's blocks back to their tiers; keep the tail of a preempted one."""
        request_id = request.request_id
        table = self.residency.tables.get(request_id, ())
        if self.residency.parking.enabled:
            forget_unfilled(self.residency, table, request.num_computed_tokens // self.block_size)
        if request.is_finished():
            self.admissions.forget(request_id)
            self._patience.forget(request_id)
            self.residency.parking.tails.drop(request_id)
        elif table and not self.stale.holds_old_kv(request_id):
            computed = min(request.num_computed_tokens, request.num_tokens)
            self.admissions.preempted(request_id, computed)
            keep_tail(self.residency, request_id, table, computed, self.block_size)
        self.residency.forget(request_id)
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

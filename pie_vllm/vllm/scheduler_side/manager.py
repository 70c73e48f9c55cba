"""vLLM's KV cache manager over two tiers of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, get_group_id
from vllm.v1.request import Request, RequestStatus

from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.policy.admission.candidate import Candidate
from pie_vllm.policy.admission.lookup import ParkedHits
from pie_vllm.policy.admission.transaction import Admission
from pie_vllm.policy.placement.interfaces import PrefixEntries
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.policy.pool.ended_requests import Whole
from pie_vllm.policy.speculation import NO_SPECULATION, DraftsInFlight, Speculation
from pie_vllm.vllm import layer_refusals
from pie_vllm.vllm.compat import engine_core
from pie_vllm.vllm.kv_groups import KvGroups
from pie_vllm.vllm.scheduler_side.block_keys import tokens_of
from pie_vllm.vllm.scheduler_side.block_pool import NotingBlockPool, PieBlockPool
from pie_vllm.vllm.scheduler_side.groups_beside import groups_beside, new_residents
from pie_vllm.vllm.scheduler_side.hit_counts import HitCounts
from pie_vllm.vllm.scheduler_side.prefix_lookup import Computed, PrefixLookup
from pie_vllm.vllm.scheduler_side.stale_kv import StaleKv

# Looked up once: an attribute of an enumeration and ``super()`` cost as much as the call itself.
_RUNNING = RequestStatus.RUNNING
_KEY_OF = attrgetter("_block_hash")  # ``block_hash`` is a property that returns it.
_allocate_stock = KVCacheManager.allocate_slots
_cache_stock = KVCacheManager.cache_blocks


class PieBlockSpaceManager(KVCacheManager):
    """vLLM's KV cache manager over resident and pooled blocks.

    It translates: who is admitted, and with what of its KV, ``Admission`` decides; where blocks
    live, ``Residency``.

    Attributes:
        geometry: Sizes of the tiers.
        groups: The model's groups of layers, one of which is pooled.
        residency: Policy that owns tiers, rows and relocation.
        admission: Policy that decides about waiting requests.
        hit_counts: What admitted requests found in the prefix cache.
        stale: Keeps KV of old weights out of prefix cache and pool.
        drafts: Draft tokens of the steps in flight.
        by_request: Whether preempted requests find their KV by name, as there is no prefix cache.
        lookup: Finds what waiting requests begin with.
    """

    def __init__(
        self,
        *args: Any,
        geometry: Geometry,
        groups: KvGroups,
        parking: str | None = None,
        watermark: float = 0.0,
        speculation: Speculation = NO_SPECULATION,
        **kwargs: Any,
    ) -> None:
        """As vLLM's manager, over ``geometry.num_blocks`` blocks.

        Args:
            args: vLLM's.
            geometry: the sizes.
            groups: the model's groups of layers.
            parking: policy of eviction of parked KV; None parks nothing. Without prefix caching,
                and where there are several groups of layers, it is that of preempted requests.
            watermark: vLLM's, which ``Admission`` holds against both tiers. vLLM's own manager
                gets 0, because it would hold it against what can be had at once.
            speculation: sizes of the server's speculation.
            kwargs: vLLM's.
        """
        with engine_core.own_block_pool(PieBlockPool):
            super().__init__(*args, watermark=0.0, **kwargs)
        managers = self.coordinator.single_type_managers
        own = managers[groups.pooled]
        if len(managers) != len(groups.others) + 1 or (
            self.block_pool.num_gpu_blocks != geometry.num_blocks
        ):
            raise UnsupportedError(
                f"--block-manager pie needs {len(groups.others) + 1} KV cache groups over "
                f"{geometry.num_blocks} blocks, vLLM made {len(managers)} over "
                f"{self.block_pool.num_gpu_blocks}. Use --block-manager default."
            )
        layer_refusals.check_partial_hits(self.coordinator)
        pool = self.block_pool
        self.geometry, self.groups = geometry, groups
        self.drafts = DraftsInFlight(speculation.rewritten)
        parks = groups.parks and self._keyed_by_block(own) and speculation is NO_SPECULATION
        if groups.others and not parks:
            parking = None  # A state that drafts went through is not one after accepted tokens.
        self.by_request = parking is not None and not self.enable_caching
        drops_last = self.enable_caching and groups.pooled in self.coordinator.eagle_group_ids
        self.residency = Residency(
            geometry,
            pool.blocks,
            FreeKVCacheBlockQueue,
            own.req_to_blocks,
            PrefixEntries(
                pool.move_entry,
                pool._maybe_evict_cached_block,
                self._put_entry,
                pool.drop_entries,
                self._of_pooled_group if groups.others and self.enable_caching else None,
                self._put_entries,
                _KEY_OF,
            ),
            parking,
            beside=groups_beside(managers, groups),
            distinct=drops_last,
        )
        pool.attach(self.residency)
        self._note_new_blocks()
        if self.by_request:
            pool.by_request = True
            engine_core.adopt_without_caching(own, pool)
        self.block_size = own.block_size
        self._in_full = engine_core.fills_only_blocks(self.coordinator)
        self._tables, self._num_cached = own.req_to_blocks, own.num_cached_block
        self._caches = own.enable_caching
        self._has_states = any(hasattr(manager, "mamba_cache_mode") for manager in managers)
        self.admission = Admission(
            self.residency,
            pool.cached,
            self.block_size,
            watermark,
            by_request=self.by_request,
            ahead=speculation.drafts + speculation.lookahead,
        )
        self.stale = StaleKv(self.residency, pool, self.admission)
        self.hit_counts = HitCounts(geometry.resident_blocks)
        self.admission.on_restored_ahead = self.hit_counts.ahead
        self.lookup = PrefixLookup(
            self,
            self._stock_computed_blocks,
            self.admission,
            self.residency.parking,
            groups,
            self.block_size,
            by_request=self.by_request,
            drops_last=drops_last,
        )

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> Computed:
        """As vLLM's, with what is parked behind its hits.

        Args:
            request: waiting.
            max_cache_hit_length: tokens that may be hit at most, given by 0.33 where outputs
                beside the KV are kept by block: a hit then ends with a block, too. None is all
                but the last.
        """
        return self.lookup.find(request, max_cache_hit_length)

    def _stock_computed_blocks(self, request: Request, *cap: int) -> Computed:
        """What vLLM finds; looked up at each call, as vLLM would."""
        blocks, tokens, boundary = super().get_computed_blocks(request, *cap)
        return blocks, tokens, boundary

    def _keyed_by_block(self, own: Any) -> bool:
        """Whether each block of the pooled group has a hash of its own, if any has."""
        return bool(not self.enable_caching or self.block_pool.hash_block_size == own.block_size)

    def _put_entry(self, block: Any, key: Any, index: int) -> None:
        self.block_pool.put_entries([block], [key], [(index + 1) * self.block_size])

    def _put_entries(self, blocks: Sequence[Any], keys: Sequence[Any], at: Sequence[int]) -> None:
        size = self.block_size
        self.block_pool.put_entries(blocks, keys, [(index + 1) * size for index in at])

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        num_encoder_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> KVCacheBlocks | None:
        """As vLLM's; who does not run yet is admitted on pie's terms.

        The request's own status says who that is, whatever way it came here: new, preempted, or a
        streaming session that goes on with the blocks it has, for which vLLM looks up no prefix.
        There are hundreds of running requests a step, most of which stay within the block that they
        have and fill none: vLLM's code would change nothing for them (``fills_only_blocks``), and
        takes ten times as long to find out. The others pass with each argument by its place: packed
        as ``*args, **kwargs`` they cost ten times as much.
        """
        running = request.status is _RUNNING
        if (
            running
            and self._in_full
            and num_new_tokens
            and new_computed_blocks is None
            and not (num_lookahead_tokens or num_external_computed_tokens)
        ):
            name, size = request.request_id, self.block_size
            tokens = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
            if tokens <= len(self._tables.get(name, ())) * size and (
                tokens < (self._num_cached.get(name, 0) + 1) * size or not self._caches
            ):
                return self.empty_kv_cache_blocks
        allocate = _allocate_stock if running else PieBlockSpaceManager._admit
        return allocate(
            self,
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            num_external_computed_tokens,
            delay_cache_blocks,
            num_encoder_tokens,
            full_sequence_must_fit,
            reserved_blocks,
            has_scheduled_reqs,
            skip_zeroing_group_ids,
        )

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """As vLLM's, which changes nothing for a request that has filled no block since."""
        cached = self._num_cached.get(request.request_id, 0)
        if not self._in_full or num_computed_tokens >= (cached + 1) * self.block_size:
            _cache_stock(self, request, num_computed_tokens)

    def _admit(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int,
        new_computed_blocks: KVCacheBlocks | None,
        num_lookahead_tokens: int,
        num_external_computed_tokens: int,
        delay_cache_blocks: bool,
        num_encoder_tokens: int,
        full_sequence_must_fit: bool,
        reserved_blocks: int,
        has_scheduled_reqs: bool,
        skip_zeroing_group_ids: tuple[int, ...],
    ) -> KVCacheBlocks | None:
        """As vLLM's ``allocate_slots``, on the terms of ``Admission``.

        They take the place of vLLM's first check, that of the whole sequence,
        v1/core/kv_cache_manager.py:515-540 in 0.32.
        """
        found = self.empty_kv_cache_blocks if new_computed_blocks is None else new_computed_blocks
        parked, hits = self.lookup.take(request.request_id) or (
            ParkedHits.none(num_new_computed_tokens),
            found.blocks[self.groups.pooled],
        )
        computed = request.num_computed_tokens
        step_end = computed + num_new_computed_tokens + num_new_tokens
        span = min(request.num_tokens if full_sequence_must_fit else step_end, self.max_model_len)
        others = others_now = 0
        lookahead = max(0, min(num_lookahead_tokens, self.max_model_len - step_end))
        if self.groups.others:
            asks = self.coordinator, self.groups.others, request, found.blocks
            spans = new_residents(*asks, num_new_computed_tokens, span)
            others = sum(map(min, spans, self.groups.residents_min))
            others_now = sum(new_residents(*asks, num_new_computed_tokens, step_end, lookahead))
        candidate = Candidate(
            request.request_id,
            request.num_tokens,
            computed,
            hits,
            parked,
            num_new_tokens,
            span,
            full_sequence_must_fit,
            has_scheduled_reqs,
            others,
            others_now,
            lookahead,
        )
        transaction = self.admission.prepare(candidate)
        if transaction is None:
            return None
        computed_here, computed_before = parked.full_tokens, parked.tail_tokens
        if parked.tail and self.groups.others:
            # All of them, so that each group's manager allocates what it needs of them.
            computed_here, computed_before = 0, parked.tokens
        if (parked.parked or parked.tail) and not parked.incomplete:
            found = self.lookup.of_pooled(transaction.hits)
        with transaction:
            blocks = super().allocate_slots(
                request,
                num_new_tokens,
                num_new_computed_tokens=computed_here,
                new_computed_blocks=found,
                num_lookahead_tokens=num_lookahead_tokens,
                num_external_computed_tokens=num_external_computed_tokens + computed_before,
                delay_cache_blocks=delay_cache_blocks,
                num_encoder_tokens=num_encoder_tokens,
                reserved_blocks=reserved_blocks,
                has_scheduled_reqs=has_scheduled_reqs,
                skip_zeroing_group_ids=skip_zeroing_group_ids,
            )
        if blocks is None:
            transaction.roll_back()
            return None
        transaction.commit()
        if not transaction.goes_on:
            self.hit_counts.count(request.request_id, transaction.hits, parked)
        return blocks

    def _of_pooled_group(self, block: Any) -> bool:
        """Whether the entry that a cached block has is one of the pooled group."""
        return bool(get_group_id(block.block_hash) == self.groups.pooled)

    def _note_new_blocks(self) -> None:
        """Have the residency hear of new blocks that are written to without a gate.

        Managers take their blocks from ``self.block_pool``, set in ``__init__``:
        v1/core/single_type_kv_cache_manager.py:110 in 0.32.
        """
        groups, managers = self.groups, self.coordinator.single_type_managers
        noting: Any = NotingBlockPool(self.block_pool)
        zeroed = self.coordinator.kv_cache_config.needs_kv_cache_zeroing
        for group in (*groups.others, *((groups.pooled,) if zeroed else ())):
            managers[group].block_pool = noting

    def free(self, request: Request) -> None:
        """Give a request's blocks back to their tiers; keep KV of a preempted one."""
        request_id, finished = request.request_id, request.is_finished()
        certain = request.num_computed_tokens - self.drafts.uncertain(request_id)
        computed = max(min(certain, request.num_tokens), 0)
        # A state is one after all tokens, those of steps in flight included.
        kept = max(certain, 0) if self.groups.others else computed
        reusable = not self.stale.holds_old_kv(request_id)
        if finished:
            self.hit_counts.forget(request_id)
        elif reusable and self.residency.tables.get(request_id):
            self.hit_counts.preempted(request_id, computed)
        self.admission.releases(
            request_id,
            kept,
            finished=finished,
            reusable=reusable and self.lookup.looks_up(request),
            whole=self._whole(request, kept) if finished and self.groups.others else None,
        )
        super().free(request)
        self.stale.freed(request)

    def _whole(self, request: Request, computed: int) -> Whole | None:
        """What of an ended request with so many computed tokens can be kept as a whole.

        The token sampled last is computed in no step, or in one that is in flight, after which a
        state is one of that token, too.
        """
        known = request.num_tokens
        computed = computed if self._has_states else min(computed, known - 1)
        return Whole(computed, tokens_of(request, known)) if computed <= known else None

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

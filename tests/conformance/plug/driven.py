"""Block managers and block pools of tests that have no scheduler."""

from __future__ import annotations

import inspect
from typing import Any

import sizes
from vllm.v1.core import block_pool, kv_cache_manager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.completed_blocks import CompletedBlocks
from pie_vllm.policy.placement.interfaces import PrefixEntries
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.vllm import layer_refusals
from pie_vllm.vllm.kv_groups import KvGroups
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool
from pie_vllm.vllm.scheduler_side.manager import PieBlockSpaceManager

StockManager, StockPool = kv_cache_manager.KVCacheManager, block_pool.BlockPool


def by_name(made: type, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of a constructor, all by name."""
    names = list(inspect.signature(made.__init__).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


_ALLOCATE = inspect.signature(PieBlockSpaceManager.allocate_slots)


class Progress:
    """Tokens of a request that count as computed: there is no scheduler here to count them."""

    def __init__(self, tokens: int) -> None:
        self.num_computed_tokens = tokens


class DrivenManager(PieBlockSpaceManager):
    """What a test allocates counts as computed when it asks for the next request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.progress: dict[str, Progress] = {}
        super().__init__(*args, **kwargs)
        self.completions = CompletedBlocks(self.block_size, self.residency)

    def next_step(self) -> None:
        residency, known = self.residency, self.progress
        for gone in [r for r in known if r not in residency.victims.holders]:
            del known[gone]
        fresh = [r for r in known if residency.victims.holders[r].progress is None]
        self.completions.next_step(known, [r for r in known if r not in fresh], fresh)
        residency.end_step({}, set(known), True, None)
        residency.check_integrity()
        self.admission.begin_step(Decision(residency.window, residency.window, 0), 1)

    def get_computed_blocks(self, request: Any, *args: Any) -> Any:
        self.next_step()
        return super().get_computed_blocks(request, *args)

    def allocate_slots(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's for who has blocks: no test here sets a status."""
        has_blocks = request.request_id in self.residency.victims.holders
        allocate = StockManager.allocate_slots if has_blocks else PieBlockSpaceManager._admit
        counts = num_new_tokens, num_new_computed_tokens
        given = _ALLOCATE.bind(self, request, *counts, *args, **kwargs)
        given.apply_defaults()
        made = allocate(*given.args)
        if made is not None and request.request_id in self.residency.victims.holders:
            done = self.progress.setdefault(request.request_id, Progress(0))
            tokens = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
            done.num_computed_tokens = tokens
        return made

    def free(self, request: Any) -> None:
        told = request.num_computed_tokens
        done = self.progress.pop(request.request_id, None)
        if done is not None:
            request.num_computed_tokens = max(told, done.num_computed_tokens)
        try:
            super().free(request)
        finally:
            request.num_computed_tokens = told


def groups_for(kv_cache_config: Any) -> KvGroups:
    """The groups of vLLM's KVCacheConfig, where a block of tokens takes one of each group."""
    groups = kv_cache_config.kv_cache_groups
    pooled = layer_refusals.check_groups(groups)
    own = groups[pooled]
    others = tuple(index for index in range(len(groups)) if index != pooled)
    return KvGroups(
        pooled,
        tuple(own.layer_names),
        own.kv_cache_spec.page_size_bytes,
        own.kv_cache_spec.block_size,
        max(len(group.layer_names) for group in groups),
        others,
        residents_min=(1 << 30,) * len(others),
        cost=1 + len(others),
    )


def make_manager(kwargs: dict[str, Any]) -> DrivenManager:
    """A manager over the sizes of the mode, for ``KVCacheManager``'s arguments."""
    config = kwargs["kv_cache_config"]
    geometry = sizes.geometry(config.num_blocks)
    kwargs = {**kwargs, "kv_cache_config": sizes.resized(config)}
    groups = groups_for(config)
    return DrivenManager(geometry=geometry, groups=groups, parking=sizes.PARKING, **kwargs)


def make_pool(kwargs: dict[str, Any]) -> PieBlockPool:
    """A pool over the sizes of the mode, for ``BlockPool``'s arguments."""
    geometry = sizes.geometry(kwargs["num_gpu_blocks"])
    pool = PieBlockPool(**{**kwargs, "num_gpu_blocks": geometry.num_blocks})
    entries = PrefixEntries(pool.move_block_hashes, pool._maybe_evict_cached_block, lambda *_: None)
    pool.attach(Residency(geometry, pool.blocks, FreeKVCacheBlockQueue, {}, entries, sizes.PARKING))
    return pool

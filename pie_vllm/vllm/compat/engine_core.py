"""vLLM's engine core and scheduler, patched to build pie's parts in place of their own.

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pie_vllm.vllm.compat.patching import expect, expect_in_order, swapped, wrapped_once


def own_block_pool(pool_class: type) -> Any:
    """Make vLLM's coordinator build ``pool_class``, its one block pool.

    Relies on ``self.block_pool = BlockPool(``, v1/core/kv_cache_coordinator.py:119, and that a
    list of free blocks can be walked, v1/core/kv_cache_utils.py:495.
    """
    from vllm.v1.core import kv_cache_coordinator as module
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    expect(FreeKVCacheBlockQueue, "def iter_blocks_after(")
    check_block_pool()
    caller = module.KVCacheCoordinator.__init__
    return swapped(module, "BlockPool", pool_class, caller, "self.block_pool = BlockPool(")


def check_block_pool() -> None:
    """Check what vLLM's pool does with entries of blocks, as pie's does for many at once.

    Read in v1/core/block_pool.py:226-291, 626-646 and 666-699 in 0.32. ``test_prefix_entries``
    compares the two.
    """
    from vllm.v1.core.block_pool import BlockPool

    expect_in_order(
        BlockPool.get_new_blocks,
        "if num_blocks > self.get_num_free_blocks():",
        "self.free_block_queue.popleft_n(num_blocks)",
        "if self._reuse_watchers:",
        "self._maybe_evict_cached_block(block)",
        "block.ref_cnt += 1",
    )
    expect_in_order(
        BlockPool.cache_full_blocks,
        "new_block_hashes = block_hashes[num_cached_blocks:]",
        "if blk.is_null or (block_mask is not None and not block_mask[i]):",
        "num_hash_tokens = (num_cached_blocks + i + 1) * block_size",
        "self._insert_block_hash(",
        "if self.enable_kv_cache_events:",
    )


def adopt_without_caching(manager: Any, block_pool: Any) -> None:
    """Have vLLM take blocks that were found without its prefix cache, as it takes cached ones.

    Relies on two flags. By that of the pool, cached blocks get another use last and lose their
    entries then, v1/core/block_pool.py:793 and :687 in 0.32; by that of a group's manager, blocks
    that were found are taken, v1/core/single_type_kv_cache_manager.py:303. The manager then has the
    pool cache full blocks, too, which is up to the pool.

    Args:
        manager: of the group whose blocks are found.
        block_pool: its pool.
    """
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    expect(BlockPool.get_new_blocks, "if self.enable_caching:")
    expect(BlockPool.free_blocks, "block.block_hash is None or not self.enable_caching")
    expect(SingleTypeKVCacheManager.add_local_computed_blocks, "if self.enable_caching:")
    block_pool.enable_caching = manager.enable_caching = True


def check_allocation() -> None:
    """Check what a running request's allocation does, as far as ``fills_only_blocks`` relies on it.

    Read in v1/core/kv_cache_manager.py:471-612 and v1/core/single_type_kv_cache_manager.py:476-533
    and :369-410 in 0.32. In 0.33 ``cache_blocks`` is bounded once more, by the hashes there are.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import (
        FullAttentionManager,
        SingleTypeKVCacheManager,
    )

    expect_in_order(
        KVCacheManager.allocate_slots,
        "self.coordinator.remove_skipped_blocks(",
        "self.coordinator.get_num_blocks_to_allocate(",
        "new_blocks = self.coordinator.allocate_new_blocks(",
        "self.coordinator.cache_blocks(request, num_tokens_to_cache)",
        "return self.create_kv_cache_blocks(new_blocks)",
    )
    expect(KVCacheManager.create_kv_cache_blocks, "else self.empty_kv_cache_blocks")
    expect(KVCacheManager.cache_blocks, "self.coordinator.cache_blocks(request, num_computed")
    expect_in_order(
        SingleTypeKVCacheManager.cache_blocks,
        "num_cached_blocks = self.num_cached_block.get(request.request_id, 0)",
        "if num_cached_blocks >= num_full_blocks:",
        "self.num_cached_block[request.request_id] = num_full_blocks",
    )
    expect(FullAttentionManager.cache_blocks, "if self.block_size == hash_block_size:")
    expect_in_order(
        SingleTypeKVCacheManager.allocate_new_blocks,
        "num_new_blocks = num_required_blocks - len(req_blocks)",
        "if num_new_blocks <= 0:",
    )


def fills_only_blocks(coordinator: Any) -> bool:
    """Whether a running request changes nothing while it stays within its blocks and fills none.

    So it is where its one group of layers has full attention and hits end with a block. Then
    ``allocate_slots`` takes blocks for tokens beyond the table, caches blocks that are full and
    not cached yet, and returns ``empty_kv_cache_blocks`` where it did neither.
    """
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    check_allocation()
    managers = coordinator.single_type_managers
    return bool(
        len(managers) == 1
        and type(managers[0]) is FullAttentionManager
        and managers[0].block_size == coordinator.block_pool.hash_block_size
    )


def check_computed_elsewhere() -> None:
    """Check how vLLM takes tokens that were computed elsewhere, as preempted requests come back.

    Relies on each group's manager allocating the blocks that these tokens still need, in its window
    or for its state, v1/core/kv_cache_coordinator.py:307 and
    v1/core/single_type_kv_cache_manager.py:326 in 0.32, and on one that waits while a step that
    computes for it is in flight, v1/core/sched/scheduler.py:934.
    """
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    expect(
        KVCacheCoordinator.allocate_new_computed_blocks,
        "manager.allocate_external_computed_blocks(",
    )
    expect(
        SingleTypeKVCacheManager.allocate_external_computed_blocks,
        "self.get_num_skipped_tokens(num_total_computed_tokens)",
    )
    expect(
        Scheduler.schedule,
        "if request.num_stale_output_tokens and not request.drop_stale_output:",
    )


def check_states() -> None:
    """Check in which blocks vLLM has states with prefix caching, ``mamba_cache_mode`` "align".

    A state is in the block of its last token, where the managers allocate a block for one that was
    computed elsewhere, v1/core/single_type_kv_cache_manager.py:1959 in 0.32, and where the runners
    look for that of a request that is resumed, v1/worker/mamba_utils.py:1412 and :1495 (V1) and
    v1/worker/gpu/model_states/mamba_hybrid.py:123 (V2). The step moves it to the block of its own
    last token. An admission takes that block besides, 1855 in the managers' file, but counts one,
    1770 there; states within a chunk of a prompt count by ``prefill_end``,
    v1/core/kv_cache_coordinator.py:233.
    """
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.single_type_kv_cache_manager import MambaManager
    from vllm.v1.worker import mamba_utils
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    expect(MambaManager.get_num_skipped_tokens, "return num_computed_tokens - 1")
    expect(
        MambaManager.get_num_blocks_to_allocate,
        "physical_block_cap = 1 + int(has_partial_hit) + checkpoint_block",
        "num_new_blocks = min(num_new_blocks, physical_block_cap)",
    )
    expect_in_order(
        MambaManager.allocate_new_blocks,
        "prev_block_len = len(req_blocks)",
        "num_new_blocks = max(num_required_blocks - len(req_blocks), 0)",
        "new_blocks = self.block_pool.get_new_blocks(num_new_blocks)",
    )
    expect(
        KVCacheCoordinator.get_num_blocks_to_allocate,
        "if self.retention_interval != 0:",
        "prefill_end = 0",
    )
    expect(
        mamba_utils.cleanup_mamba_state_idx,
        "(finished_req_ids, preempted_req_ids, resumed_req_ids)",
    )
    expect(
        mamba_utils.preprocess_mamba,
        "prev_state_idx = (req_state.num_computed_tokens - 1) // block_size",
        "cdiv(req_state.num_computed_tokens + num_scheduled_tokens, block_size)",
    )
    expect(
        MambaHybridModelState.add_request,
        "(new_req_data.num_computed_tokens - 1) // mamba_block_size",
    )


def own_block_manager(factory: Callable[..., Any]) -> Any:
    """Make vLLM's scheduler build its KV cache manager by ``factory``.

    Relies on ``self.kv_cache_manager = KVCacheManager(``, v1/core/sched/scheduler.py:328, and on
    the calls of methods that pie's scheduler overrides: for each waiting request that is looked
    at, 929 there, and when a streaming session goes on, 2626 there.
    """
    from vllm.v1.core.sched import scheduler as module

    expect(module.Scheduler.schedule, "= self._handle_blocked_waiting_request(request)")
    expect(module.Scheduler.add_request, "self._update_request_as_session(existing, update)")
    caller = module.Scheduler.__init__
    line = "self.kv_cache_manager = KVCacheManager("
    return swapped(module, "KVCacheManager", factory, caller, line)


def after_kv_caches(
    then: Callable[[Any, Any], None], first: Callable[[Any], None] | None = None
) -> None:
    """Call ``then(engine_core, vllm_config)`` once the workers have their KV caches.

    ``first(vllm_config)`` is called before they get them.

    The scheduler needs the sizes that the workers chose; vLLM hands it the
    number of blocks only. Relies on ``kv_cache_config = self._initialize_kv_caches(
    vllm_config)`` before the scheduler is made, v1/engine/core.py:156.
    """
    from vllm.v1.engine.core import EngineCore

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def initialize(self: Any, vllm_config: Any) -> Any:
            if first is not None:
                first(vllm_config)
            result = original(self, vllm_config)
            then(self, vllm_config)
            return result

        return initialize

    wrapped_once(EngineCore, "_initialize_kv_caches", wrap)


def check_engine_core() -> None:
    """Check the line that ``after_kv_caches`` relies on."""
    from vllm.v1.engine.core import EngineCore

    expect(EngineCore.__init__, "kv_cache_config = self._initialize_kv_caches(vllm_config)")

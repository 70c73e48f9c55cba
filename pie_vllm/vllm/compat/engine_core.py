"""vLLM's engine core and scheduler, patched to build pie's parts in place of their own.

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pie_vllm.vllm.compat.patching import expect, swapped, wrapped_once


def own_block_pool(pool_class: type) -> Any:
    """Make vLLM's coordinator build ``pool_class``, its one block pool.

    Relies on ``self.block_pool = BlockPool(``, v1/core/kv_cache_coordinator.py:119, and that a
    list of free blocks can be walked, v1/core/kv_cache_utils.py:495.
    """
    from vllm.v1.core import kv_cache_coordinator as module
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    expect(FreeKVCacheBlockQueue, "def iter_blocks_after(")
    caller = module.KVCacheCoordinator.__init__
    return swapped(module, "BlockPool", pool_class, caller, "self.block_pool = BlockPool(")


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

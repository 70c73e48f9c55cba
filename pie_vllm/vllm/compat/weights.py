"""vLLM's calls that change weights or adapters.

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from pie_vllm.vllm.compat.patching import expect, wrapped_once

NEW_WEIGHTS = (
    "add_lora",
    "apply_model",
    "elastic_ep_execute",
    "finish_weight_update",
    "load_model",
    "reload_weights",
    "remove_lora",
    "reset_weights",
    "start_draft_weight_update",
    "start_weight_update",
    "update_weights",
    "wake_up",
)
"""Worker methods after which KV may be that of other weights, v1/worker/gpu_worker.py:380-1587."""

SAME_WEIGHTS = (
    "annotate_profile",
    "check_health",
    "checkpoint_prepare",
    "checkpoint_restore",
    "compile_or_warm_up_model",
    "compute_weight_checksums",
    "determine_available_memory",
    "discard",
    "execute_dummy_batch",
    "execute_model",
    "get_cache_block_size_bytes",
    "get_compilation_match_table",
    "get_draft_model",
    "get_encoder_timing_stats",
    "get_kv_cache_spec",
    "get_kv_connector_handshake_metadata",
    "get_model",
    "get_model_inspection",
    "get_simple_cpu_offload_num_cpu_blocks",
    "get_supported_kv_cache_layouts",
    "get_supported_tasks",
    "handle_ft_command",
    "init_device",
    "init_weight_transfer_engine",
    "init_worker",
    "initialize_from_config",
    "list_loras",
    "pie_counters",
    "pie_geometry",
    "pie_prior",
    "pin_lora",
    "profile",
    "randomize_dummy_inputs",
    "release_late_interaction_query_cache",
    "reset_encoder_cache",
    "reset_mm_cache",
    "sample_tokens",
    "save_sharded_state",
    "save_tensorized_model",
    "set_kv_cache_layout",
    "shutdown",
    "shutdown_weight_transfer_engine",
    "sleep",
    "supports_draft_weight_updates",
    "synchronize_device",
    "take_draft_token_ids",
    "update_config",
    "update_environment_variables",
    "update_max_model_len",
    "wait_for_comm",
)
"""Worker methods that leave weights alone. A call of any other name, a worker extension's say, or
of a function counts as new weights: that is how weights come from a trainer."""


def after_new_weights(then: Callable[[Any], None]) -> None:
    """Call ``then(engine_core)`` after each call of the workers that may change weights.

    A call that fails counts too: some of the weights may be new. Relies on every such call going
    through ``EngineCore.collective_rpc``, v1/engine/core.py:1073.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(self, method, *args, **kwargs)
            finally:
                if not isinstance(method, str) or method not in SAME_WEIGHTS:
                    then(self)

        return collective_rpc

    wrapped_once(EngineCore, "collective_rpc", wrap)


def after_new_adapter(name: str, then: Callable[[Any, Any], None]) -> None:
    """Call ``then(engine_core, argument)`` after a call of the engine core about an adapter.

    A call that fails counts too: some of the workers may have the new one.

    Args:
        name: ``add_lora``, whose argument is vLLM's LoRARequest, or ``remove_lora``, whose argument
            is the adapter's number; v1/engine/core.py:1051.
        then: what is called.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def changed(self: Any, argument: Any) -> Any:
            try:
                return original(self, argument)
            finally:
                then(self, argument)

        return changed

    wrapped_once(EngineCore, name, wrap)


def check_weights() -> None:
    """Check the lines that these functions and ``stale_kv`` rely on."""
    expect(
        EngineCore.collective_rpc,
        "return self.model_executor.collective_rpc(method, timeout, args, kwargs)",
    )
    expect(EngineCore.add_lora, "return self.model_executor.add_lora(lora_request)")
    expect(EngineCore.remove_lora, "return self.model_executor.remove_lora(lora_id)")
    expect(generate_block_hash_extra_keys, '[("cache_salt", request.cache_salt)]')
    expect(Request.update_block_hashes, "self.block_hashes.extend(self._block_hasher(self))")

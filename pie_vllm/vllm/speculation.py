"""vLLM's speculation as the policy sees it."""

from __future__ import annotations

from typing import Any

from pie_vllm.errors import ConfigError
from pie_vllm.geometry import cdiv
from pie_vllm.policy.speculation import NO_SPECULATION, Speculation


def speculation_of(config: Any) -> Speculation:
    """Sizes of speculation in a finished VllmConfig.

    vLLM writes the last tokens of a draft model with several modules again:
    ``num_reprefillable_tokens``, v1/core/kv_cache_coordinator.py:88 in 0.32.
    """
    if config.speculative_config is None:
        return NO_SPECULATION
    return Speculation(
        config.num_speculative_tokens,
        config.num_lookahead_tokens,
        max(config.num_prefill_lookahead_tokens - 1, 0),
    )


def takes_turns(config: Any, has_states: bool) -> bool:
    """Whether a running request may be left out of a step.

    V1's runner takes one that is left out from its batch and adds it again later. With speculation
    it then forgets how many tokens were accepted, which tells states of models with such layers
    (``num_accepted_tokens_cpu``, v1/worker/gpu_input_batch.py:479 in 0.32), and where schedules
    are asynchronous its drafts, which are looked up by their place in the last batch
    (v1/worker/gpu_model_runner.py:1364). V2 keeps both by the request's slot.

    Args:
        config: the finished VllmConfig.
        has_states: whether the model has layers with states, such as Mamba's.
    """
    if config.speculative_config is None or config.use_v2_model_runner:
        return True
    return not (has_states or config.scheduler_config.async_scheduling)


def written_blocks(config: Any, block_size: int) -> int:
    """Blocks of one request that steps in flight may write to; 0 without speculation.

    All of them are resident until it is known which tokens were accepted.
    """
    if config.speculative_config is None:
        return 0
    speculation = speculation_of(config)
    steps = int(config.max_concurrent_batches)
    tokens = steps * speculation.tokens_max + speculation.lookahead + speculation.rewritten
    return 1 + cdiv(tokens, block_size)


def check_residents(config: Any, resident_blocks: int, block_size: int) -> None:
    """Refuse a device that does not hold what the steps in flight of one request write to.

    Raises:
        ConfigError: says how many blocks are needed.
    """
    needed, usable = written_blocks(config, block_size), resident_blocks - 1
    if needed > usable:
        raise ConfigError(
            f"--speculative-config with {config.num_speculative_tokens} tokens writes to {needed} "
            f"KV blocks of a request, which must be in device memory together, and {usable} are "
            "all that fit there. Raise --kv-cache-memory-bytes or --gpu-memory-utilization, or "
            "lower num_speculative_tokens."
        )

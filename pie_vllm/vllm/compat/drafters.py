"""The layers of a drafter: those that vLLM runs for drafts, after the model's own."""

from __future__ import annotations

from typing import Any

from pie_vllm.errors import UnsupportedError

NAMES = (("drafter", "_draft_attn_layer_names"), ("speculator", "draft_attn_layer_names"))
"""Where the V1 and the V2 runner keep them: ``SpecDecodeBaseProposer.load_model``,
v1/spec_decode/llm_base_proposer.py:1335 in 0.32, and ``DraftModelSpeculator.load_model``,
v1/worker/gpu/spec_decode/speculator.py:235."""


def draft_layers(runner: Any, speculative_config: Any) -> frozenset[str]:
    """Names of the attention layers that a model runner's drafter has; none without a drafter.

    Args:
        runner: vLLM's model runner, with its models loaded.
        speculative_config: of the finished configuration; None without speculative decoding.

    Raises:
        UnsupportedError: the drafter has layers with KV, and this vLLM does not say which.
    """
    if speculative_config is None or not speculative_config.uses_draft_kv_cache():
        return frozenset()
    for owner, names in NAMES:
        found = getattr(getattr(runner, owner, None), names, None)
        if found:
            return frozenset(found)
    raise UnsupportedError(
        "--block-manager pie cannot tell the layers of the drafter (--speculative-config, method "
        f"{speculative_config.method}) from the model's: {type(runner).__name__} has neither "
        f"{' nor '.join('.'.join(pair) for pair in NAMES)}. Remove --speculative-config, or use "
        "--block-manager default."
    )

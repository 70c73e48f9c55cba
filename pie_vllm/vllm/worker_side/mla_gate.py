"""Gates of layers with multi-head latent attention (MLA), around the layer itself.

An MLA implementation has no single method that reads KV: a step may call ``forward_mha`` for its
prompts and ``forward_mqa`` for its decodes, and prompts read the context that is cached, too. The
layer's ``forward_impl`` encloses all of them, its ``update_kv_cache`` the write.
"""

from __future__ import annotations

from typing import Any

from pie_vllm.vllm.worker_side import gate


def install(attention: Any, layer: int, switch: gate.GateSwitch) -> None:
    """Put the gates of ``layer`` around vLLM's MLAAttention layer, in place.

    The layer keeps its class: vLLM looks up by its name which weights are quantized when weights
    are loaded anew (model_executor/layers/quantization/modelopt.py:2414). The lines of vLLM that
    call both methods are in ``mla_layers``.

    Args:
        attention: the layer, an object of vLLM's own class.
        layer: its number in the order of the ring.
        switch: what connects the gates with the engine.
    """
    kind = type(attention)

    def update_kv_cache(*args: Any, **kwargs: Any) -> Any:
        gate.before_write(switch, layer)
        return kind.update_kv_cache(attention, *args, **kwargs)

    def forward_impl(*args: Any, **kwargs: Any) -> Any:
        return gate.around_read(switch, layer, kind.forward_impl, attention, *args, **kwargs)

    attention.update_kv_cache = update_kv_cache
    attention.forward_impl = forward_impl

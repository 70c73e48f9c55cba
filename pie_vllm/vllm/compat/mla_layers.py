"""vLLM's layers with multi-head latent attention (MLA): who writes and who reads their KV.

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked.
"""

from __future__ import annotations

from typing import Any

from pie_vllm.vllm.compat.patching import expect, expect_in_order


def is_mla(layer: Any) -> bool:
    """Whether a layer's attention backend is one for MLA."""
    return bool(layer.attn_backend.is_mla())


def is_plain(layer: Any) -> bool:
    """Whether an MLA layer writes and reads KV in vLLM's own methods, and in no other way.

    Models with layers of their own class may call kernels that write KV. Sparse layers have KV of
    an indexer beside them, and HiSparse keeps KV elsewhere.
    """
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    return type(layer) is MLAAttention and not layer.impl.is_sparse and layer.hisparse_cache is None


def check_mla_layers() -> None:
    """Check that KV is written by ``update_kv_cache``, and read by ``forward_impl`` after it.

    Relies on ``MLAAttention.forward``, model_executor/layers/attention/mla_attention.py:813 (in
    0.33 :829), which calls both, or the two operations of :1416 and :1464 (:1438, :1486) that call
    them. Graphs are split at both, config/compilation.py:770 and :1206 (:1213).

    Raises:
        UnsupportedError: this vLLM does it otherwise.
    """
    from vllm.config import CompilationConfig
    from vllm.model_executor.layers.attention import mla_attention

    layer = mla_attention.MLAAttention
    expect_in_order(
        layer.forward,
        "self.update_kv_cache(",
        "self.forward_impl(",
        "torch.ops.vllm.unified_mla_kv_cache_update(",
        "torch.ops.vllm.unified_mla_attention_with_output(",
    )
    expect(layer.update_kv_cache, "self.impl.do_kv_cache_update(")
    expect_in_order(layer.forward_impl, "self.impl.forward_mha(", "self.impl.forward_mqa(")
    expect(mla_attention.unified_mla_kv_cache_update, "attn_layer.update_kv_cache(")
    expect(mla_attention.unified_mla_attention_with_output, "layer.forward_impl(")
    expect(
        CompilationConfig.splitting_ops_contain_kv_cache_update,
        '"vllm::unified_mla_kv_cache_update"',
    )

"""KV of 8 bits on a CPU without AVX-512, for which vLLM has no kernel: torch's own operators do it.

All else is vLLM's: types, sizes and layout of the pages, scales, block tables, slots.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def enable() -> None:
    """Before an engine with such KV: put kernels of ours in place of those that are missing.

    They come in through ``_get_attn_isa``, v1/attention/backends/cpu_attn.py:509 in 0.32, and the
    three operators that the module calls as ``ops``. KV of other types passes through to vLLM's.
    """
    import torch
    from vllm.v1.attention.backends import cpu_attn

    if torch.cpu._is_avx512_supported() or hasattr(cpu_attn, "pie_test_kernels"):
        return
    ops, get_isa = cpu_attn.ops, cpu_attn._get_attn_isa
    write, attend = ops.cpu_attn_reshape_and_cache, ops.cpu_attention_with_kv_cache
    metadata = ops.cpu_attn_get_scheduler_metadata

    def isa(dtype: Any, block_size: int, head_size: Any = None, *_: Any) -> Any:
        return get_isa(dtype, block_size, head_size)

    def any_metadata(**given: Any) -> Any:
        return metadata(**{**given, "kv_cache_dtype": "auto"})

    def any_write(*given: Any, **named: Any) -> None:
        (_write if _is_fp8(named) else write)(*given, **named)

    def any_attend(**named: Any) -> None:
        (_attend if _is_fp8(named) else attend)(**named)

    cpu_attn._get_attn_isa = isa
    ops.cpu_attn_get_scheduler_metadata = any_metadata
    ops.cpu_attn_reshape_and_cache = any_write
    ops.cpu_attention_with_kv_cache = any_attend
    cpu_attn.pie_test_kernels = True


def _is_fp8(named: dict[str, Any]) -> bool:
    return str(named["kv_cache_dtype"]).startswith("fp8")


def _kind(kv_cache_dtype: str) -> Any:
    import torch

    return torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn


def _write(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slots: Any,
    _isa: str,
    k_scale: float,
    v_scale: float,
    kv_cache_dtype: str,
) -> None:
    """Quantize keys and values into their slots; caches are (block, head, slot, size)."""
    import torch

    kind = _kind(kv_cache_dtype)
    most = torch.finfo(kind).max
    used = slots[slots >= 0]
    blocks, places = used // key_cache.shape[2], used % key_cache.shape[2]
    for new, scale, cache in ((key, k_scale, key_cache), (value, v_scale, value_cache)):
        scaled = (new[: len(slots)][slots >= 0].float() / scale).clamp(-most, most)
        cache[blocks, :, places] = scaled.to(kind).view(torch.uint8)


def _attend(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    output: Any,
    query_start_loc: Any,
    seq_lens: Any,
    block_table: Any,
    scale: float,
    k_scale: float,
    v_scale: float,
    kv_cache_dtype: str,
    **_: Any,
) -> None:
    """Causal attention of each request over its blocks."""
    import torch

    kind, size = _kind(kv_cache_dtype), key_cache.shape[2]
    for number, (first, last) in enumerate(pairwise(query_start_loc.tolist())):
        length = int(seq_lens[number])
        blocks = block_table[number, : -(-length // size)].long()
        key, value = (
            cache[blocks].view(kind).transpose(0, 1).flatten(1, 2)[:, :length].float() * factor
            for cache, factor in ((key_cache, k_scale), (value_cache, v_scale))
        )
        positions = torch.arange(length - (last - first), length)
        seen = torch.arange(length) <= positions[:, None]
        found = torch.nn.functional.scaled_dot_product_attention(
            query[first:last].transpose(0, 1).float(),
            key,
            value,
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )
        output[first:last] = found.transpose(0, 1).to(output.dtype)

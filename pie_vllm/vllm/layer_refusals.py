"""Refusals by what a model's layers are: groups, pages, attention backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pie_vllm.vllm.compat import mla_layers
from pie_vllm.vllm.refusals import refuse

BACKENDS = {"cpu": ("CPU_ATTN",), "cuda": ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")}
"""Attention backends by device, in vLLM's names."""

MLA_BACKENDS = {
    "cpu": ("CPU_MLA", "AMX_MLA"),
    "cuda": ("FLASHMLA", "FLASH_ATTN_MLA", "FLASHINFER_MLA", "TRITON_MLA"),
}
"""Those of multi-head latent attention (MLA)."""


def check_groups(groups: Sequence[Any]) -> int:
    """Check that one of vLLM's KV cache groups can be pooled, and that the others can lie beside.

    Args:
        groups: vLLM's KVCacheGroupSpecs.

    Returns:
        Index of the pooled group.

    Raises:
        UnsupportedError: names the layer, and says why.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    if not groups:
        raise refuse("models without attention", "there is no KV to pool", "Choose another model")
    full = [
        index
        for index, group in enumerate(groups)
        if type(group.kv_cache_spec) in (FullAttentionSpec, MLAAttentionSpec)
    ]
    for index, group in enumerate(groups):
        if index not in full:
            _check_beside(group)
    if not full:
        spec = groups[0].kv_cache_spec
        raise refuse(
            f"models without full attention: layer {groups[0].layer_names[0]} has a "
            f"{type(spec).__name__}",
            "windows, chunks and states are small and stay on the device, so there is no KV to "
            "pool",
            "Choose another model",
        )
    if len(full) > 1:
        raise refuse(
            f"{len(full)} groups of full attention ({groups[full[1]].layer_names[0]} is in the "
            "second)",
            "vLLM splits these layers because the model has more of them than of the other kinds, "
            "and one group is pooled",
            "Set --disable-hybrid-kv-cache-manager where the model allows it",
        )
    _check_pages(groups, groups[full[0]].kv_cache_spec)
    return full[0]


def check_states(groups: Sequence[Any], speculative: Any) -> None:
    """Refuse speculation with layers that keep states, such as Mamba's.

    Raises:
        UnsupportedError: names the layer.
    """
    for group in groups:
        if speculative is not None and hasattr(group.kv_cache_spec, "mamba_type"):
            raise refuse(
                f"speculative decoding (--speculative-config) with layer {group.layer_names[0]}, "
                "which keeps a state",
                "states of rejected tokens were not tested beside pooled KV",
                "Remove --speculative-config",
            )


def _check_pages(groups: Sequence[Any], pooled: Any) -> None:
    """Refuse pages that cannot share their place, or are not KV of the attention alone.

    Raises:
        UnsupportedError: says of what size or kind they are.
    """
    pages = {group.kv_cache_spec.page_size_bytes for group in groups}
    if len(pages) > 1:
        raise refuse(
            f"KV pages of {sorted(pages)} bytes",
            "pages of all groups must have one size, because they share their place",
            "Choose another --block-size",
        )
    if pooled.page_size_padded is not None:
        raise refuse("padded KV pages", "a page must be one run", "Choose another block size")
    if getattr(pooled, "state_content_bytes", None) is not None:
        raise refuse(
            f"KV of type {pooled.cache_dtype_str}, where a token's latent and scales are one "
            "record",
            "sparse MLA attention uses it, which was not tested",
            "Set --kv-cache-dtype auto and choose a model without sparse attention",
        )


def check_partial_hits(coordinator: Any) -> None:
    """Refuse prefix hits that end within a block: the worker would copy a page that may be pooled.

    Args:
        coordinator: vLLM's KVCacheCoordinator.

    Raises:
        UnsupportedError: names the flag.
    """
    if coordinator.enable_partial_hash_hits:
        raise refuse(
            "prefix hits within a block (--prefix-match-unit, or block sizes that differ)",
            "vLLM copies such a block on the device, where pooled blocks are not",
            "Remove --prefix-match-unit, or set --no-enable-prefix-caching",
        )


def _check_beside(group: Any) -> None:
    """Refuse a group that may not lie beside a pooled one.

    Raises:
        UnsupportedError: names its first layer.
    """
    from vllm.v1 import kv_cache_interface as interface

    spec, name = group.kv_cache_spec, group.layer_names[0]
    if type(spec) is interface.UniformTypeKVCacheSpecs:
        raise refuse(
            f"layer {name} with a KV cache of its own shape",
            "all layers must have one page size",
            "Choose a model with equal attention layers",
        )
    if type(spec) not in (
        interface.SlidingWindowSpec,
        interface.ChunkedLocalAttentionSpec,
        interface.MambaSpec,
    ):
        raise refuse(
            f"layer {name} with {type(spec).__name__}",
            "pie knows full attention, sliding windows, local chunks and states of linear "
            "attention only",
            "Choose another model",
        )


def check_layers(names: Sequence[str], context: dict[str, Any], device: str) -> None:
    """Refuse attention implementations that were not tested, or whose KV write cannot be gated.

    Args:
        names: names of the layers with KV.
        context: vLLM's layers by name.
        device: a key of ``args.WORKERS``.

    Raises:
        UnsupportedError: names the layer.
    """
    for name in names:
        layer = context[name]
        if mla_layers.is_mla(layer):
            _check_mla_layer(name, layer, device)
        else:
            _check_layer(name, layer, device)
    for name, layer in context.items():
        if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
            raise refuse(
                f"layer {name}, which shares the KV of another layer",
                "it would read another layer's ring slot",
                "Choose another model",
            )


def _check_layer(name: str, layer: Any, device: str) -> None:
    backend = layer.attn_backend.get_name()
    if backend not in BACKENDS[device]:
        raise refuse(
            f"attention backend {backend}",
            f"pie was made for {', '.join(BACKENDS[device])} on this device",
            f"Set --attention-backend {BACKENDS[device][0]}",
        )
    if layer.attn_backend.forward_includes_kv_cache_update or not hasattr(
        layer.impl, "do_kv_cache_update"
    ):
        raise refuse(
            f"attention backend {backend}",
            "it writes KV inside its forward pass",
            "Choose another --attention-backend",
        )
    if getattr(layer, "kv_cache_update_bypass", False):
        raise refuse(
            f"layer {name}, whose KV write is fused",
            "it cannot be ordered with copies",
            "Choose another model",
        )


def _check_mla_layer(name: str, layer: Any, device: str) -> None:
    """The same for a layer with latent attention, which is gated as a whole.

    Its backends say of themselves that their forward pass writes KV, by inheritance only.
    """
    backend = layer.attn_backend.get_name()
    if backend not in MLA_BACKENDS[device]:
        raise refuse(
            f"attention backend {backend}",
            f"for MLA, pie was made for {', '.join(MLA_BACKENDS[device])} on this device",
            "Set --attention-backend to one of them",
        )
    if not mla_layers.is_plain(layer):
        raise refuse(
            f"MLA layer {name}, a {type(layer).__name__} with kernels or KV of its own",
            "its KV write cannot be ordered with copies",
            "Choose a model with dense MLA layers",
        )
    mla_layers.check_mla_layers()

"""vLLM's KV cache laid out over the arena: one tensor, a page of each layer kept together."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry


def over_arena(kv_cache_config: Any, geometry: Geometry, pooled: Sequence[str]) -> Any:
    """A copy of vLLM's KV cache configuration laid out over the arena.

    All groups begin at the first region. The pooled layers are there in the order of the ring,
    which is that in which the model runs them, and then those of a drafter.

    Args:
        kv_cache_config: vLLM's.
        geometry: sizes of the arena.
        pooled: names of the layers of the pooled group, in order.

    Raises:
        UnsupportedError: vLLM laid the cache out in a way that cannot be aliased.
    """
    config = deepcopy(kv_cache_config)
    tensors = config.kv_cache_tensors
    groups = config.kv_cache_groups
    strides = {tensor.block_stride for tensor in tensors}
    if len(tensors) != len(groups) or strides != {geometry.page_bytes}:
        raise UnsupportedError(
            f"--block-manager pie needs one KV cache tensor a group, with unpadded pages of "
            f"{geometry.page_bytes} bytes, vLLM made {len(tensors)} for {len(groups)} groups with "
            f"block strides {sorted(strides)}. Use --block-manager default."
        )
    if config.num_blocks != geometry.num_blocks:
        raise UnsupportedError(
            f"vLLM chose {config.num_blocks} KV blocks, the block manager offered "
            f"{geometry.num_blocks}. Do not limit the number of blocks otherwise."
        )
    for tensor in tensors:
        if set(tensor.layers) == set(pooled):
            tensor.layers = list(pooled)
        tensor.size = geometry.virtual_bytes
        tensor.offset = geometry.shift
        tensor.layer_stride = geometry.layer_stride
    return config


def views(
    arena: Any, kv_cache_config: Any, layout: Any, kernel_block_sizes: Any = None
) -> dict[str, Any]:
    """Views of each layer's KV over the arena, by the layer's name.

    As ``allocate_kv_cache``, v1/worker/utils.py:598 in 0.32.

    Args:
        arena: one-dimensional tensor of the arena's bytes, on the device.
        kv_cache_config: from ``over_arena``.
        layout: vLLM's order of a KV cache's dimensions.
        kernel_block_sizes: tokens of a block as the attention kernel counts them, by group of
            layers; None is as vLLM's blocks.

    Raises:
        UnsupportedError: the layout does not keep a page of a layer together.
    """
    from vllm.v1.kv_cache_interface import create_kv_cache_views

    if not (layout.is_layer_compact and layout.is_block_compact):
        raise UnsupportedError(
            f"--block-manager pie needs the KV cache layout LBNHC or LBHNC, found "
            f"{layout.name}. Set VLLM_KV_CACHE_LAYOUT=LBNHC (or LBHNC) if the attention "
            "backend allows it, or use --block-manager default."
        )
    found: dict[str, Any] = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        number, group = next(
            (number, group)
            for number, group in enumerate(kv_cache_config.kv_cache_groups)
            if tensor.layers[0] in group.layer_names
        )
        sizes = kernel_block_sizes or ()
        made = create_kv_cache_views(
            arena,
            group.kv_cache_spec,
            kv_cache_config.num_blocks,
            layout,
            tensor,
            kernel_block_size=sizes[number] if number < len(sizes) else None,
        )
        found.update(zip(tensor.layers, made, strict=True))
    return found

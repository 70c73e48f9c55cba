"""vLLM's KV cache laid out over the arena: one tensor, a page of each layer kept together."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry


def over_arena(kv_cache_config: Any, geometry: Geometry) -> Any:
    """A copy of vLLM's KV cache configuration laid out over the arena.

    Raises:
        UnsupportedError: vLLM laid the cache out in a way that cannot be aliased.
    """
    config = deepcopy(kv_cache_config)
    tensors = config.kv_cache_tensors
    if len(tensors) != 1 or tensors[0].block_stride != geometry.page_bytes:
        raise UnsupportedError(
            "--block-manager pie needs one KV cache tensor with unpadded pages of "
            f"{geometry.page_bytes} bytes, vLLM made {len(tensors)} with block stride "
            f"{[t.block_stride for t in tensors]}."
        )
    if config.num_blocks != geometry.num_blocks:
        raise UnsupportedError(
            f"vLLM chose {config.num_blocks} KV blocks, the block manager offered "
            f"{geometry.num_blocks}. Do not limit the number of blocks otherwise."
        )
    tensors[0].size = geometry.virtual_bytes
    tensors[0].offset = geometry.shift
    tensors[0].layer_stride = geometry.layer_stride
    return config


def views(
    arena: Any, kv_cache_config: Any, layout: Any, kernel_block_sizes: Any = None
) -> dict[str, Any]:
    """Views of each layer's KV over the arena, by the layer's name.

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
    tensor = kv_cache_config.kv_cache_tensors[0]
    found = create_kv_cache_views(
        arena,
        kv_cache_config.kv_cache_groups[0].kv_cache_spec,
        kv_cache_config.num_blocks,
        layout,
        tensor,
        kernel_block_size=kernel_block_sizes[0] if kernel_block_sizes else None,
    )
    return dict(zip(tensor.layers, found, strict=True))

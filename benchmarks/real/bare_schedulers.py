"""vLLM's real schedulers, pie's on top, over small sizes and without a model that runs."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import cache
from mmap import PAGESIZE
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

import pie_vllm
from benchmarks.harness.model import ROOT, made_once
from benchmarks.make_model import DEFAULT_OUTPUT
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior
from pie_vllm.vllm import settings
from pie_vllm.vllm.scheduler_side.scheduler import make_scheduler

_ARRIVALS = itertools.count()


def geometry(resident: int, pooled: int, rows: int | None = None, **other: int) -> Geometry:
    """Small sizes: one 4 KiB page per block and layer unless said otherwise."""
    sizes = {
        "num_layers": 4,
        "page_bytes": 4096,
        "ring_slots": 2,
        "chunk_rows": 8,
        "granularity": PAGESIZE,
        **other,
    }
    return Geometry(
        resident_blocks=resident,
        pooled_blocks=pooled,
        rows=pooled if rows is None else rows,
        **sizes,
    )


@cache
def _base_config(parking: str) -> VllmConfig:
    args = EngineArgs(
        model=str(made_once(ROOT / DEFAULT_OUTPUT)),
        max_model_len=4096,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        **pie_vllm.engine_args(pool_gib=0.1, parking=parking, pool_start_gib=1e-6),
    )
    return args.create_engine_config()


def vllm_config(
    sizes: Geometry,
    block_size: int,
    parking: str = "lru",
    prior: Prior | None = None,
    **scheduler: Any,
) -> VllmConfig:
    """A finished VllmConfig; other keywords are fields of the scheduler or cache config."""
    config = deepcopy(_base_config(parking))
    config.cache_config.block_size = block_size
    for name, value in scheduler.items():
        owner = config.scheduler_config
        if not hasattr(owner, name):
            owner = config.model_config if name == "max_model_len" else config.cache_config
        assert hasattr(owner, name), name
        setattr(owner, name, value)
    settings.of(config).geometry = sizes
    settings.of(config).prior = prior or Prior()
    return config


def make(
    sizes: Geometry, block_size: int = 16, flavour: Any = make_scheduler, **options: Any
) -> Any:
    """The scheduler that vLLM would make over these sizes, or one of another class."""
    config = vllm_config(sizes, block_size, **options)
    layers = [f"layers.{i}" for i in range(sizes.num_layers)]
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.float32
    )
    stride = sizes.layer_stride
    tensor = KVCacheTensor(
        size=sizes.virtual_bytes, layers=layers, layer_stride=stride, block_stride=sizes.page_bytes
    )
    kv_cache_config = KVCacheConfig(
        num_blocks=sizes.num_blocks,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(layers, spec)],
    )
    config.cache_config.num_gpu_blocks = sizes.num_blocks
    return flavour(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=True,
        block_size=block_size,
        hash_block_size=block_size,
    )


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    block_size: int,
    priority: int = 0,
    **other: Any,
) -> Request:
    """A greedy request that runs to ``max_tokens``; other keywords are vLLM's ``Request``'s."""
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    parameters.update_from_generation_config({}, eos_token_id=None)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling_params=parameters,
        pooling_params=None,
        priority=priority,
        arrival_time=float(next(_ARRIVALS)),
        block_hasher=get_request_block_hasher(block_size, hash_function),
        **other,
    )

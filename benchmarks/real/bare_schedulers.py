"""vLLM's real schedulers, pie's on top, over small sizes and without a model that runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from math import lcm
from mmap import PAGESIZE
from types import SimpleNamespace
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
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

import pie_vllm
from benchmarks.harness.model import ROOT, made_once
from benchmarks.make_model import DEFAULT_OUTPUT
from pie_vllm.geometry import Geometry, round_up
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
    drafts: tuple[int, int] = (0, 0),
    **scheduler: Any,
) -> VllmConfig:
    """A finished VllmConfig; other keywords are fields of the scheduler or cache config.

    ``drafts`` are the draft tokens of a step and the slots behind them, of a drafter without layers
    of its own.
    """
    config = deepcopy(_base_config(parking))
    if drafts[0]:
        config.speculative_config = speculative_config(*drafts)
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


def speculative_config(tokens: int, lookahead: int) -> Any:
    """What a scheduler asks of vLLM's SpeculativeConfig."""
    no: Any = lambda: False  # noqa: E731
    return SimpleNamespace(
        method="draft_model" if lookahead else "ngram",
        num_speculative_tokens=tokens,
        num_speculative_tokens_per_batch_size=None,
        max_num_new_slots_for_drafting=0,
        use_eagle=no,
        use_eagle_block_drop=no,
        needs_eagle_block_drop=no,
        use_dspark=no,
        use_dflash=lambda: lookahead > tokens,
        use_multi_module_mtp=no,
        uses_draft_model=lambda: lookahead == tokens,
    )


def _groups(
    sizes: Geometry, block_size: int, longest: int, beside: Sequence[int]
) -> list[KVCacheGroupSpec]:
    """The groups of a model: those without a pool, then full attention."""
    shape: Any = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
    full = FullAttentionSpec(block_size=block_size, **shape)
    specs: list[KVCacheSpec] = [
        SlidingWindowSpec(block_size=block_size, sliding_window=window, **shape)
        if window
        else MambaSpec(
            block_size=round_up(longest, block_size),
            shapes=((full.page_size_bytes // 4,),),
            dtypes=(torch.float32,),
        )
        for window in beside
    ]
    return [
        KVCacheGroupSpec([f"layers.{number}.{i}" for i in range(sizes.num_layers)], spec)
        for number, spec in enumerate([*specs, full])
    ]


def make(
    sizes: Geometry,
    block_size: int = 16,
    flavour: Any = make_scheduler,
    beside: Sequence[int] = (),
    **options: Any,
) -> Any:
    """The scheduler that vLLM would make over these sizes, or one of another class.

    Args:
        sizes: of the tiers.
        block_size: tokens of a block.
        flavour: makes the scheduler.
        beside: groups of layers without a pool that the model has: tokens of a window each, or 0
            for a state.
        options: fields of the configuration.
    """
    config = vllm_config(sizes, block_size, **options)
    groups = _groups(sizes, block_size, config.model_config.max_model_len, beside)
    kv_cache_config = KVCacheConfig(
        num_blocks=sizes.num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=sizes.virtual_bytes,
                layers=group.layer_names,
                layer_stride=sizes.layer_stride,
                block_stride=sizes.page_bytes,
            )
            for group in groups
        ],
        kv_cache_groups=groups,
    )
    scheduled = lcm(*(group.kv_cache_spec.block_size for group in groups))
    config.cache_config.num_gpu_blocks = sizes.num_blocks
    return flavour(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=True,
        block_size=scheduled,
        hash_block_size=scheduled if 0 in beside else block_size,
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

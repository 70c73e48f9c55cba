"""Small models of many families, with random weights: what vLLM does with a family's layers.

The configurations have the shape of the family's layers (windows, states, experts, latents) and
are otherwise as small as vLLM's kernels for CPUs allow. They have no tokenizer: prompts are token
ids and engines run with ``skip_tokenizer_init``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.mla_model import LATENTS

VOCABULARY = 512
"""Tokens of every model."""

WINDOW = 64
"""Tokens of a sliding window or of an attention chunk."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Settings of every configuration that knows them."""

KEPT = ("A_log", "D", "dt_bias")
"""Weights that keep the values of their family: random ones make a state explode."""

STRONG = ("q_proj", "k_proj", "qkv_proj", "c_attn", "o_proj", "out_proj", "c_proj")
EMBEDDING = re.compile(r"embed|\.w[tp]e\.")
SHARP_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        config: class of transformers' that configures it.
        layers: number of its layers.
        settings: further ones of its configuration, over those of ``COMMON``.
        dtype: of weights and KV; float32 where vLLM's kernels for CPUs have it.
        model: class of transformers' that has the weights; None is that of causal language models.
        engine: arguments of ``vllm.LLM`` without which it does not start here.
        block_size: tokens of a block.
        embedding: standard deviation of token embeddings; larger, an answer follows its last token
            more.
        refused: pattern of pie's refusal; empty where pie gives stock's tokens.
        not_in_stock: pattern of what stock vLLM says where it cannot run the family on a CPU.
        cached_chunk: with prefix caching, tokens of a chunk of a prompt where stock vLLM runs the
            family on a CPU with chunks of one block only: those of Mamba 2 within which lies the
            end of a block raise IndexError (mamba_mixer2.py:880 in 0.32). None is any.
    """

    config: str
    layers: int
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    model: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    block_size: int = 32
    embedding: float = 0.5
    refused: str = ""
    not_in_stock: str = ""
    cached_chunk: int | None = None


def _every(period: int, layers: int, last: str, others: str) -> list[str]:
    """Layer types of which each ``period``-th is ``last``."""
    return [last if i % period == period - 1 else others for i in range(layers)]


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
NARROW_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_expand": 1}
DELTA = {
    "head_dim": 128,
    "num_key_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}

FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        "Gemma3TextConfig",
        19,
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": _every(6, 19, FULL, SLIDING),
        },
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        6,
        {
            **MOE,
            "sliding_window": WINDOW,
            "layer_types": _every(2, 6, FULL, SLIDING),
        },
    ),
    "llama4": Family(
        "Llama4TextConfig",
        8,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "attention_chunk_size": WINDOW,
        },
        embedding=1.0,
    ),
    "lfm2": Family(
        "Lfm2Config",
        6,
        {
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [1, 3, 5],
            "conv_dim": 128,
            "block_dim": 128,
        },
    ),
    "qwen3-next": Family(
        "Qwen3NextConfig",
        12,
        {
            **DELTA,
            **NARROW_MOE,
            "layer_types": _every(4, 12, FULL, LINEAR),
        },
        dtype="bfloat16",
    ),
    "llama": Family("LlamaConfig", 4),
    "qwen2-moe": Family("Qwen2MoeConfig", 4, NARROW_MOE),
    "gpt2": Family("GPT2Config", 4),
    "gemma4": Family(
        "Gemma4TextConfig",
        12,
        {
            "sliding_window": WINDOW,
            "layer_types": _every(6, 12, FULL, SLIDING),
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 64,
        },
    ),
    "mistral-sliding": Family(
        "MistralConfig", 4, {"sliding_window": WINDOW}, refused="models without full attention"
    ),
    "granite-hybrid": Family(
        "GraniteMoeHybridConfig",
        7,
        {
            **MOE,
            **MAMBA2,
            "mamba_expand": 2,
            "shared_intermediate_size": 64,
            "attention_multiplier": 0.2,
            "layer_types": _every(2, 7, FULL, LINEAR),
        },
        cached_chunk=32,
    ),
    "nemotron-h": Family(
        "NemotronHConfig",
        8,
        {
            "layers_block_type": [LINEAR, "mlp", FULL, "mlp"] * 3,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "expand": 1,
        },
        cached_chunk=32,
    ),
    "falcon-h1": Family("FalconH1Config", 4, {**MAMBA2, "mamba_d_ssm": 128}, cached_chunk=32),
    "jamba": Family(
        "JambaConfig",
        6,
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_expand": 1,
        },
        not_in_stock="no attribute 'selective_scan_fwd'",
    ),
    "deepseek-v3": Family(
        "DeepseekV3Config",
        4,
        LATENTS,
        engine={"attention_backend": "CPU_MLA", "max_num_scheduled_tokens": 512},
        block_size=16,
    ),
    "mixtral": Family("MixtralConfig", 4, {**MOE, "sliding_window": None}),
    "gemma2": Family(
        "Gemma2Config",
        6,
        {
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "layer_types": _every(2, 6, FULL, SLIDING),
        },
        embedding=0.05,
    ),
    "gemma3n": Family(
        "Gemma3nTextConfig",
        10,
        {
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "layer_types": _every(5, 10, FULL, SLIDING),
            "num_kv_shared_layers": 5,
            "intermediate_size": [128] * 10,
            "activation_sparsity_pattern": [0.0] * 10,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 16,
        },
        refused="share",
    ),
    "cohere2": Family(
        "Cohere2Config",
        6,
        {"sliding_window": WINDOW, "layer_types": _every(3, 6, FULL, SLIDING)},
    ),
    "olmo3": Family(
        "Olmo3Config",
        6,
        {"sliding_window": WINDOW, "layer_types": _every(3, 6, FULL, SLIDING)},
    ),
    "exaone4": Family(
        "Exaone4Config",
        6,
        {
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "layer_types": _every(3, 6, FULL, SLIDING),
        },
    ),
    "phi3": Family("Phi3Config", 4),
    "opt": Family("OPTConfig", 4, {"ffn_dim": 128, "word_embed_proj_dim": 128}),
}


def make(name: str, folder: Path) -> Path:
    """Write a family's model to ``folder``, unless it is there, and return the folder.

    Equal weights in every process and at every time.

    Raises:
        KeyError: no such family.
    """
    import torch
    import transformers

    family = FAMILIES[name]
    if (folder / "config.json").exists():
        return folder
    config = configuration(family)
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM
    if family.model is None:
        model = kind.from_config(config, dtype=torch.float32)
    else:
        model = getattr(transformers, family.model)(config)
    randomise(model.named_parameters(), family.embedding)
    model.to(getattr(torch, family.dtype)).save_pretrained(folder)
    return folder


def configuration(family: Family) -> Any:
    """The family's configuration, of transformers' class."""
    import transformers

    settings = {**COMMON, "num_hidden_layers": family.layers}
    own = family.settings
    if "text_config" in own:
        settings = {**own, "text_config": {**settings, **own["text_config"]}}
    else:
        settings |= own
    return getattr(transformers, family.config)(**settings)


def randomise(parameters: Iterable[tuple[str, Any]], embedding: float) -> None:
    """Weights with which answers depend on all of the prompt.

    Matrices keep the size of what they multiply. Attention has sharper scores, so that it picks
    single tokens and does not average over all, and weighs more against the last token's embedding.
    """
    import torch

    for name, parameter in sorted(parameters):
        kind = name.removesuffix(".weight").rpartition(".")[2]
        with torch.no_grad():
            if kind in SHARP_NORMS:
                parameter += 1  # Families count from 0 or from 1.
            elif parameter.ndim > 1 and kind not in KEPT:
                fan_in = parameter.shape[-1] if parameter.ndim == 2 else parameter.shape[1]
                std = embedding if EMBEDDING.search(name) else 1 / math.sqrt(fan_in)
                parameter.normal_(0, 2 * std if kind in STRONG else std)

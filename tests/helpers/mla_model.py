"""A small model with multi-head latent attention, of the shape of DeepSeek V3 and Kimi K2."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.engine import ELEMENT, Setup

LAYERS, WORDS = 5, 2048
LATENT, ROPE = 512, 64
"""Elements of a token's latent and of its rotary key; vLLM's kernels for CPUs take no others."""

BLOCK_SIZE = 16
"""Tokens of a block; vLLM's CPU_MLA takes no other."""

LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # As the real models. Without it vLLM's kernel for CPUs mixes the tokens of a batch.
    "rope_scaling": {
        "type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
"""Settings of a small model's latents and experts, in configurations of DeepSeek."""

CONFIG = {
    **LATENTS,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class MlaSetup(Setup):
    """An engine's settings for this model: a page has one latent and rotary key a token."""

    @property
    def page(self) -> int:
        """Bytes of a block in one layer."""
        return self.block_size * (LATENT + ROPE) * ELEMENT[self.dtype]


def mla_model(like: Path, folder: Path) -> Path:
    """Write the model to ``folder``, with the tokenizer of the model ``like``, and return it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(like / name, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    chance = torch.Generator().manual_seed(9317)

    def weight(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.randn(shape, generator=chance) * shape[-1] ** -0.5

    weights = {name: weight(shape) for name, shape in _shapes().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts(count: int, least: int, spread: int, seed: int = 3) -> list[list[int]]:
    """Random tokens, by a seed: ``least`` plus 0 to ``spread`` of them, in no order."""
    chosen = random.Random(seed)
    return [
        [chosen.randrange(3, WORDS) for _ in range(least + i * 29 % (spread + 1))]
        for i in range(count)
    ]


def _shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each weight, by its name in a checkpoint."""
    get: Any = CONFIG.__getitem__
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    found = {
        "model.embed_tokens.weight": (WORDS, hidden),
        "lm_head.weight": (WORDS, hidden),
        "model.norm.weight": (hidden,),
    }
    attention = {
        "q_a_proj": (get("q_lora_rank"), hidden),
        "q_a_layernorm": (get("q_lora_rank"),),
        "q_b_proj": (heads * (get("qk_nope_head_dim") + ROPE), get("q_lora_rank")),
        "kv_a_proj_with_mqa": (LATENT + ROPE, hidden),
        "kv_a_layernorm": (LATENT,),
        "kv_b_proj": (heads * (get("qk_nope_head_dim") + get("v_head_dim")), LATENT),
        "o_proj": (hidden, heads * get("v_head_dim")),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = (hidden,)
        found |= {f"{prefix}self_attn.{name}.weight": s for name, s in attention.items()}
        if layer < get("first_k_dense_replace"):
            found |= _mlp(f"{prefix}mlp.", hidden, get("intermediate_size"))
            continue
        number, width = get("n_routed_experts"), get("moe_intermediate_size")
        found[f"{prefix}mlp.gate.weight"] = (number, hidden)
        found[f"{prefix}mlp.gate.e_score_correction_bias"] = (number,)
        found |= _mlp(f"{prefix}mlp.shared_experts.", hidden, width)
        for expert in range(number):
            found |= _mlp(f"{prefix}mlp.experts.{expert}.", hidden, width)
    return found


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }

"""Two offline caches of a model hub: configurations alone, and one small model under many names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

REVISION = "0" * 40

ALIASES = (
    "facebook/opt-125m",
    "hmellor/tiny-random-LlamaForCausalLM",
    "distilbert/distilgpt2",
    "openai-community/gpt2",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2-1.5B-Instruct",
    "HuggingFaceH4/zephyr-7b-beta",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "JackFram/llama-160m",
    "Qwen/Qwen2-VL-2B-Instruct",
)
"""Names of models in vLLM's tests that the small model stands for."""

_OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "activation_function": "relu",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "torch_dtype": "float16",
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "facebook/opt-125m": {
        **_OPT,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "word_embed_proj_dim": 768,
        "do_layer_norm_before": True,
    },
    "facebook/opt-350m": {
        **_OPT,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "Qwen/Qwen3-0.6B": {
        **_QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "eos_token_id": 151645,
        "hidden_act": "silu",
    },
    "Qwen/Qwen1.5-7B": {
        **_QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
    },
}
"""Configurations that the core tests read; there are no weights."""


def make_hubs(folder: Path, real: Path) -> None:
    """Make ``folder/configs`` and ``folder/alias``.

    Args:
        folder: of both caches.
        real: folder of the real model, whose tokenizer the small one gets.
    """
    small = folder / "small"
    if not (small / "model.safetensors").exists():
        write_small_model(small, real)
    for name, config in CONFIGS.items():
        (_snapshot(folder / "configs", name) / "config.json").write_text(json.dumps(config))
    for name in ALIASES:
        snapshot = _snapshot(folder / "alias", name)
        for file in small.iterdir():
            if not (snapshot / file.name).exists():
                (snapshot / file.name).symlink_to(file)


def _snapshot(hub: Path, name: str) -> Path:
    base = hub / "hub" / ("models--" + name.replace("/", "--"))
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs/main").write_text(REVISION)
    folder = base / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder


LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 8, 256, 512, 4, 2, 64, 49152
END_OF_TEXT, OFTEN = 2, 2.3
"""Token and factor of its row of the tied head: texts then end after some thirty tokens."""


def write_small_model(folder: Path, real: Path) -> None:
    """Write a random Llama with the real tokenizer.

    Its answers depend on all of the KV, and a step takes milliseconds.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(real / file, folder)
    shutil.copy(real / "generation_config.json", folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int, std: float) -> Any:
        return torch.randn(*shape, generator=generator) * std

    tensors = {
        "model.embed_tokens.weight": weight(VOCABULARY, HIDDEN, std=1.0 / 16),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN, 0.12),
            "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN, 0.12),
            "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN, 0.12),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE, 0.12),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN, 0.06),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN, 0.06),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE, 0.06),
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN)
        for name, (rows, columns, std) in shapes.items():
            tensors[f"{prefix}{name}.weight"] = weight(rows, columns, std=std)
    tensors["model.embed_tokens.weight"][END_OF_TEXT] *= OFTEN
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

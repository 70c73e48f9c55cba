"""A model that two ranks can share, its engine settings and a load."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.helpers.engine import HEAD, Setup, request, round_

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, WORDS = 256, 4, 4, 2, 512, 2048


CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""Variables for the ranks' processes: a core each."""


def two_rank_model(tokenizer: Path, folder: Path) -> Path:
    """A small Llama of random weights; the heads of the real small model do not divide by two."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "intermediate_size": INNER,
        "vocab_size": WORDS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, generator=generator) * (1.5 / columns**0.5)

    weights = {
        "model.embed_tokens.weight": torch.randn(WORDS, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": matrix(WORDS, HIDDEN),
    }
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            weights[f"{prefix}{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.ones(HIDDEN)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def two_rank_setup(model: Path) -> Setup:
    """Few residents on each of two ranks."""
    other = {"max_num_seqs": 16}
    return Setup(
        model, LAYERS, 30, 50, dtype="float32", other=other, kv_heads=KV_HEADS // 2, ranks=2
    )


def rounds() -> list[dict[str, Any]]:
    """14 requests of random tokens."""
    chosen = random.Random(3)
    prompts = [[chosen.randrange(3, WORDS) for _ in range(60 + 6 * i)] for i in range(14)]
    return [round_([request(prompt, max_tokens=24) for prompt in prompts])]

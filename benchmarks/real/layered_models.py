"""Two models of random weights that are equal but for what their layers attend to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness.builds import build_once

LAYERS, PERIOD, WINDOW = 48, 4, 64
"""Layers; one of so many has full attention in the hybrid; tokens of the others' window."""

KV_HEADS, HEAD = 2, 64
KINDS = {"plain": 1, "hybrid": PERIOD}
"""By name, of how many layers one has full attention."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "query_pre_attn_scalar": HEAD,
    "sliding_window": WINDOW,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made_once(kind: str, folder: Path, like: Path) -> Path:
    """The folder with the model in it, made there on first use by whichever process comes first.

    Args:
        kind: key of ``KINDS``.
        folder: where it is made.
        like: folder of the model whose tokenizer it has.
    """
    build_once(folder / "model.safetensors", lambda: _write(kind, folder, like))
    return folder


def _write(kind: str, folder: Path, like: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    period = KINDS[kind]
    layers = [
        "full_attention" if i % period == period - 1 else "sliding_attention" for i in range(LAYERS)
    ]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(**SIZES, layer_types=layers), dtype=torch.float32
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        if (like / name).exists():
            shutil.copy(like / name, folder / name)
    model.to(torch.bfloat16).save_pretrained(folder)

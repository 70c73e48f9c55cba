"""Models for vLLM that this check writes itself: a configuration, or small random weights too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.builds import ROOT

SMALL_REAL = ROOT / "build" / "models" / "smollm2-135m"


class Shape(NamedTuple):
    """Sizes of a Llama.

    Attributes:
        hidden, inner, layers, heads, kv_heads, head, vocab: sizes of its configuration.
        window: number of tokens of the sliding windows; 0 where no layer has one.
        full_every: number of layers of which the last one has full attention.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    window: int = 0
    full_every: int = 1

    @property
    def full_layers(self) -> int:
        """Number of layers with full attention; the others have windows."""
        return self.layers // self.full_every

    @property
    def regions(self) -> int:
        """Number of pages of a block: layers of the largest of vLLM's groups of layers."""
        return min(self.full_layers, self.layers - self.full_layers) or self.layers

    def window_blocks(self, block_size: int) -> int:
        """Number of blocks that windows hold of a request, a chunk of its prompt included."""
        groups = (self.layers - self.full_layers) // self.regions
        return groups * (-(-self.window // block_size) + 1)

    def page_bytes(self, block_size: int, element: int) -> int:
        """One block in one layer."""
        return block_size * 2 * self.kv_heads * self.head * element

    @property
    def layer_bytes(self) -> int:
        """Weights of a layer in bf16."""
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.inner)


EIGHT_B = Shape(4096, 14336, 32, 32, 8, 128, 128256)
"""The shape of Llama-3-8B."""

TINY = Shape(256, 512, 4, 4, 2, 64, 4096)
SMALL = Shape(576, 1536, 12, 9, 3, 64, 49152)
"""The shape of SmolLM2-135M, with fewer layers."""
WINDOWS = SMALL._replace(window=64, full_every=3)
"""The same with a sliding window in two of three layers."""


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json."""
    attention = {}
    if shape.window:
        kinds = ("sliding_attention",) * (shape.full_every - 1) + ("full_attention",)
        attention = {
            "layer_types": [kinds[layer % shape.full_every] for layer in range(shape.layers)],
            "sliding_window": shape.window,
        }
    return {
        **attention,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def write_config(folder: Path, shape: Shape) -> Path:
    """A folder with a configuration alone, for `load_format="dummy"`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    return folder


def write_random(folder: Path, shape: Shape) -> Path:
    """A folder with random weights of a usual size.

    vLLM's dummy weights are a thousandth: KV would change no bit of such a model's answers, so that
    equal answers would show nothing.
    """
    import torch
    from safetensors.torch import save_file

    done = folder / "model.safetensors"
    if done.exists():
        return folder
    generator = torch.Generator().manual_seed(20261123)

    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        weights: torch.Tensor = torch.randn(rows, columns, generator=generator)
        return weights.mul_(scale / columns**0.5).to(torch.bfloat16)

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    tensors = {
        "model.embed_tokens.weight": normal(shape.vocab, shape.hidden, shape.hidden**0.5),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": normal(shape.vocab, shape.hidden, 2.0),
    }
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        tensors |= {
            # Keys and queries twice the usual size: attention that is sharp, not an average.
            name + "self_attn.q_proj.weight": normal(queries, shape.hidden, 2.0),
            name + "self_attn.k_proj.weight": normal(keys, shape.hidden, 2.0),
            name + "self_attn.v_proj.weight": normal(keys, shape.hidden),
            name + "self_attn.o_proj.weight": normal(shape.hidden, queries),
            name + "mlp.gate_proj.weight": normal(shape.inner, shape.hidden),
            name + "mlp.up_proj.weight": normal(shape.inner, shape.hidden),
            name + "mlp.down_proj.weight": normal(shape.hidden, shape.inner),
            name + "input_layernorm.weight": ones.clone(),
            name + "post_attention_layernorm.weight": ones.clone(),
        }
    write_config(folder, shape)
    staged = done.with_suffix(".new")
    save_file(tensors, staged, metadata={"format": "pt"})
    staged.replace(done)
    return folder


def small_model(scratch: Path) -> tuple[Path, Shape, str]:
    """The small real model where it is there, else random weights; its shape; what it is."""
    config = SMALL_REAL / "config.json"
    if config.exists() and (SMALL_REAL / "model.safetensors").exists():
        found = json.loads(config.read_text())
        names = (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "vocab_size"),
        )
        return SMALL_REAL, Shape(*(found[name] for name in names)), "SmolLM2-135M"
    folder = write_random(scratch / "models" / "random-small", SMALL)
    return folder, SMALL, "random weights of SmolLM2's widths, 12 layers"

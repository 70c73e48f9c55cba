"""Two ranks carry out the same plans, each on its heads and with its own pool."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pie_vllm.policy.detector import Prior
from pie_vllm.vllm import ranks
from tests.helpers.engine import HEAD, Engines, Setup, request, round_
from tests.helpers.engine_load import check_diverse, check_traffic, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, WORDS = 256, 4, 4, 2, 512, 2048


def two_rank_model(tokenizer: Path, folder: Path) -> Path:
    """A small Llama of random weights; the heads of the real small model do not divide by two."""
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


@pytest.fixture(scope="module")
def setup(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Few residents on each of two ranks."""
    model = two_rank_model(few, tmp_path_factory.mktemp("ranks") / "model")
    other = {"max_num_seqs": 16}
    sizes = {"kv_heads": KV_HEADS // 2, "ranks": 2}
    return Setup(model, LAYERS, 30, 50, dtype="float32", other=other, **sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines whose ranks have a core each."""
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    shared = Engines(tmp_path_factory.mktemp("two"), cores)
    yield shared
    shared.close()


def rounds() -> list[dict[str, Any]]:
    """14 requests of random tokens."""
    chosen = random.Random(3)
    prompts = [[chosen.randrange(3, WORDS) for _ in range(60 + 6 * i)] for i in range(14)]
    return [round_([request(prompt, max_tokens=24) for prompt in prompts])]


def test_tokens_are_stocks(two_ranks: Engines, setup: Setup) -> None:
    """Tokens of pie on two ranks are stock's on two ranks; without loads they are not."""
    (pie,) = two_ranks.run(setup, rounds())
    (broken,) = two_ranks.run(replace(setup, debug=("skip_loads",)), rounds())
    (stock,) = two_ranks.run(setup, rounds(), "stock")
    assert pie["schedule"] == broken["schedule"] == stock["schedule"]
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)
    assert pie["counters"]["rows"] == setup.pooled, "each rank takes its share of --pie-pool-gib"
    assert tokens(pie) == tokens(stock)
    assert tokens(broken) != tokens(stock)


def test_the_slowest_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least bandwidth and the longest step; what one rank does not know, none does."""
    mine = Prior(bandwidth=20e9, step_seconds=0.01, request_seconds=1e-4, prompt_seconds=2e-5)
    theirs = (15e9, -0.02, -5e-5, -3e-5)

    def least(*values: float) -> tuple[float, ...]:
        return tuple(map(min, zip(values, theirs, strict=True)))

    monkeypatch.setattr(ranks, "least", least)
    found = ranks.slowest(mine)
    assert found == mine._replace(bandwidth=15e9, step_seconds=0.02, prompt_seconds=3e-5)
    theirs = (0.0, 0.0, 0.0, 0.0)
    assert ranks.slowest(Prior()) == Prior()
    assert ranks.slowest(mine).bandwidth is None

"""LoRA adapters: answers are stock vLLM's, and KV is shared within an adapter only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import reloaded_adapter
from tests.helpers.engine import Engines, Setup, request
from tests.helpers.engine_inputs import adapter
from tests.helpers.engine_load import chats, check_diverse, tokens
from tests.helpers.engine_model import LAYERS
from tests.helpers.two_turns import check_kept, encoded, two_turns

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ANSWER, CHATS = 24, 11
ADAPTERS = (("one", 1), ("other", 2))

# A place stays empty: with all taken, stock's own answers for CPUs become one token, repeated.
LORA = {"enable_lora": True, "max_loras": len(ADAPTERS) + 1, "max_lora_rank": reloaded_adapter.RANK}
Record = dict[str, Any]
Turns = tuple[list[Record], list[Record]]


@pytest.fixture(scope="module")
def ample(few: Path) -> Setup:
    """What stock runs with."""
    return Setup(few, len(LAYERS), 500, 0, dtype="float32", other=LORA)


@pytest.fixture(scope="module")
def parked(ample: Setup) -> Setup:
    """Too few blocks, hardly any pooled ids, and rows for all."""
    other = {**LORA, "enable_prefix_caching": True, "max_num_batched_tokens": 256}
    return replace(ample, resident=40, pooled=6, rows=400, other=other)


@pytest.fixture(scope="module")
def turns(engines: Engines, ample: Setup, tmp_path_factory: pytest.TempPathFactory) -> Turns:
    """Both turns of chats that are held with each adapter and without; stock's answers differ."""
    config = json.loads((ample.model / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    folder = tmp_path_factory.mktemp("adapters")
    beside: list[dict[str, Any]] = [{}]
    for name, number in ADAPTERS:
        path = reloaded_adapter.adapter(folder / name, config, number)
        beside.append(adapter(name, number, path))
    asked = [
        request(prompt, max_tokens=ANSWER, beside=one)
        for prompt in encoded(ample.model, chats(CHATS, 4, 8))
        for one in beside
    ]
    rounds, records = two_turns(engines, ample, asked)
    for record in records:
        check_diverse(record)
        answers = [str(answer) for answer in tokens(record)]
        for i in range(0, len(answers), len(beside)):
            assert len(set(answers[i : i + len(beside)])) == len(beside)
    return rounds, records


def test_tokens_are_stocks(engines: Engines, parked: Setup, turns: Turns) -> None:
    """With preemptions, KV in the pool and parked KV of the first turn, each adapter its own."""
    rounds, stock = turns
    first, second = engines.run(parked, rounds)
    check_kept(parked, [first, second], stock)
    assert not any(answer["cached_tokens"] for answer in first["answers"])
    assert second["hits"]["parked"] > 60


def test_keys_without_adapters_show(engines: Engines, parked: Setup, turns: Turns) -> None:
    """Negative control: KV of another adapter is found, and answers differ."""
    rounds, stock = turns
    for pie, right in zip(
        engines.run(replace(parked, blind_keys=True), rounds), stock, strict=True
    ):
        assert tokens(pie) != tokens(right)

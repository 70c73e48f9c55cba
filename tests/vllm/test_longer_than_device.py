"""One request may be longer than the device's KV memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.engine import EngineError, Engines, Setup, request, round_
from tests.helpers.engine_load import check_mostly_pooled, check_traffic, facts, tokens, user

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def setup(model: Path) -> Setup:
    """The whole model; the device holds a third of the longest context."""
    return Setup(model, 30, 10, 40, dtype="float32", other={"max_model_len": 1024})


def test_context_longer_than_the_device(engines: Engines, setup: Setup) -> None:
    """It completes, exactly, with more KV than the device has bytes for."""
    text = user(facts(5, 95))
    (pie,), (stock,) = engines.both(setup, [round_([request(text, max_tokens=32)])])
    (answer,) = pie["answers"]
    context = answer["prompt_tokens"] + len(answer["tokens"][0])
    assert context * setup.page // setup.block_size * setup.layers > 1.5 * setup.device_bytes
    assert len(answer["tokens"][0]) == 32
    assert tokens(pie) == tokens(stock)
    assert not pie["preempted"]
    check_mostly_pooled(pie)
    check_traffic(pie, setup.page * setup.layers)


def test_stock_refuses(engines: Engines, setup: Setup) -> None:
    """Stock vLLM with the same bytes does not even start."""
    with pytest.raises(EngineError, match="larger than the available KV cache memory"):
        engines.run(setup, [], "starved")

"""On the same schedule, pie's bf16 tokens and logprobs are stock vLLM's, bit for bit.

Stock has as many blocks as pie, all on the device. That the schedules are the
same is asserted, too: otherwise bf16 would differ from itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, check_diverse, check_mostly_pooled, check_traffic
from tests.helpers.engine_model import LAYERS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def load(sentences: int, spread: int, answer: int) -> list[dict[str, Any]]:
    """32 greedy chats with the top five logprobs of each token."""
    texts = chats(32, sentences, spread)
    return [round_([request(text, max_tokens=answer, logprobs=5) for text in texts])]


LOADS = {32: load(4, 8, 24), 64: load(6, 14, 48), 128: load(14, 22, 44)}
"""By block size. Answers are so long that all chats run at once."""

RESIDENT = {32: 44, 64: 40, 128: 40}
"""Room for the tails of 32 requests and the prompt chunks of two steps, hardly more."""

BUDGET = {32: 128, 64: 128, 128: 256}


def check(engines: Engines, setup: Setup, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Assert that pie and stock agree on everything, and that pie did pool; pie's record."""
    (pie,), (stock,) = engines.both(setup, rounds)
    assert pie["schedule"] == stock["schedule"]
    assert pie["answers"] == stock["answers"]
    assert pie["most_running"] >= 32
    check_diverse(stock)
    check_mostly_pooled(pie)
    check_traffic(pie, setup.page * setup.layers)
    return pie


@pytest.mark.parametrize(("block_size", "slots"), [(32, 2), (32, 5), (64, 3), (128, 3)])
def test_tokens_and_logprobs_are_stocks(
    engines: Engines, few: Path, block_size: int, slots: int
) -> None:
    """Block size and number of ring slots change no token and no logprob."""
    setup = Setup(
        few,
        len(LAYERS),
        RESIDENT[block_size],
        150,
        slots=slots,
        block_size=block_size,
        other={"max_num_batched_tokens": BUDGET[block_size]},
    )
    check(engines, setup, LOADS[block_size])


def test_compiled(engines: Engines, few: Path) -> None:
    """Gates hold under torch.compile: they are outside of the compiled pieces."""
    setup = Setup(few, len(LAYERS), RESIDENT[32], 150, other={"enforce_eager": False})
    check(engines, setup, LOADS[32])


def test_all_layers(engines: Engines, model: Path) -> None:
    """The whole real model."""
    check(engines, Setup(model, 30, RESIDENT[32], 150), load(3, 6, 22))

"""A model with experts, on one rank: answers are stock vLLM's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.engine import Engines, Setup, request
from tests.helpers.engine_load import chats, check_diverse
from tests.helpers.engine_model import LAYERS
from tests.helpers.few_layer_models import with_experts
from tests.helpers.two_turns import check_kept, encoded, two_turns
from tests.vllm.test_exact import LOADS, RESIDENT, check

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ANSWER = 24


@pytest.fixture(scope="module")
def experts(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which each token sees two experts of four."""
    return with_experts(few, tmp_path_factory.mktemp("experts") / "model")


def test_tokens_and_logprobs_are_stocks(engines: Engines, experts: Path) -> None:
    """On the same schedule, bit for bit."""
    check(engines, Setup(experts, len(LAYERS), RESIDENT[32], 150), LOADS[32])


@pytest.mark.soak
def test_preempted_and_returning_chats(engines: Engines, experts: Path) -> None:
    """With parked KV, as if nothing had been evicted."""
    ample = Setup(experts, len(LAYERS), 500, 0, dtype="float32")
    other = {"enable_prefix_caching": True, "max_num_batched_tokens": 256}
    parked = replace(ample, resident=40, pooled=6, rows=400, other=other)
    prompts = encoded(experts, chats(32, 4, 8))
    rounds, stock = two_turns(engines, ample, [request(p, max_tokens=ANSWER) for p in prompts])
    first, second = engines.run(parked, rounds)
    for right in stock:
        check_diverse(right)
    check_kept(parked, [first, second], stock)
    assert second["hits"]["parked"] > 100

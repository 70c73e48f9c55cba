"""KV of 8 bits: answers are stock vLLM's, in blocks of half the bytes.

vLLM's kernels for it on CPUs need AVX-512. Where there is none, tests/helpers/fp8_on_cpu.py
has others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.engine import Engines, Setup, request
from tests.helpers.engine_load import chats, check_diverse
from tests.helpers.engine_model import LAYERS
from tests.helpers.two_turns import check_kept, encoded, two_turns
from tests.vllm.test_exact import LOADS, RESIDENT, check

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_tokens_and_logprobs_are_stocks(engines: Engines, few: Path) -> None:
    """On the same schedule, bit for bit."""
    other = {"kv_cache_dtype": "fp8_e5m2"}
    setup = Setup(few, len(LAYERS), RESIDENT[32], 150, other=other)
    assert setup.page == replace(setup, other={}).page // 2
    check(engines, setup, LOADS[32])


@pytest.mark.soak
def test_preempted_and_returning_chats(engines: Engines, few: Path) -> None:
    """With parked KV, as if nothing had been evicted."""
    other = {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 256}
    ample = Setup(few, len(LAYERS), 500, 0, dtype="float32", other=other)
    cached = {**other, "enable_prefix_caching": True}
    parked = replace(ample, resident=40, pooled=6, rows=400, other=cached)
    prompts = encoded(few, chats(32, 4, 8))
    rounds, stock = two_turns(engines, ample, [request(p, max_tokens=24) for p in prompts])
    first, second = engines.run(parked, rounds)
    for right in stock:
        check_diverse(right)
    check_kept(parked, [first, second], stock)
    assert second["hits"]["parked"] > 100

"""Where pie's schedule differs from stock's, float32 tokens are stock's.

Stock has memory for everything and no prefix cache, so its tokens depend on
the request alone. Pie preempts, hits its prefix cache, cuts prompts into small
chunks and loses requests meanwhile.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import (
    chats,
    check_diverse,
    check_traffic,
    facts,
    tokens,
    user,
)
from tests.helpers.engine_model import LAYERS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ANSWER = 40
GRAMMAR = {
    "skip_tokenizer_init": False,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
"""What structured output needs; without whitespace, so that it ends."""

Record = dict[str, Any]


def memory_for_all(few: Path) -> Setup:
    """What stock runs with; it can compile grammars."""
    other = {**GRAMMAR, "max_num_batched_tokens": 256}
    return Setup(few, len(LAYERS), 400, 0, dtype="float32", other=other)


@pytest.fixture(scope="module")
def ample(few: Path) -> Setup:
    """Stock's."""
    return memory_for_all(few)


@pytest.fixture(scope="module")
def scarce(few: Path) -> Setup:
    """Too few blocks, pooled ones included, for 32 chats at once."""
    other = dict(GRAMMAR)
    return Setup(few, len(LAYERS), 36, 50, dtype="float32", other=other)


@pytest.fixture(scope="module")
def cached(few: Path) -> Setup:
    """Prefix cache, small prompt chunks, and priorities."""
    other = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
        "scheduling_policy": "priority",
    }
    return Setup(few, len(LAYERS), 40, 50, dtype="float32", other=other)


def both(
    engines: Engines, setup: Setup, ample: Setup, requests: list[Record], **options: bool
) -> tuple[Record, Record]:
    """One round on pie; the same on stock, without priorities and aborts."""
    plain = [{**r, "priority": 0, "abort_at": None} for r in requests]
    (pie,), (stock,) = engines.both(setup, [round_(requests, **options)], ample, [round_(plain)])
    check_diverse(stock)
    check_traffic(pie, setup.page * setup.layers)
    return pie, stock


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return chats(32, 4, 8)


def test_preemption(engines: Engines, ample: Setup, scarce: Setup, texts: list[str]) -> None:
    """Requests that are preempted and computed again answer as if they had not been."""
    pie, stock = both(engines, scarce, ample, [request(t, max_tokens=ANSWER) for t in texts])
    assert pie["preempted"]
    assert not stock["preempted"]
    assert tokens(pie) == tokens(stock)


@pytest.mark.parametrize(("link_gbps", "contention"), [(0.02, None), (0.1, None), (0.1, True)])
def test_turns_and_limits(
    engines: Engines,
    ample: Setup,
    scarce: Setup,
    texts: list[str],
    link_gbps: float,
    contention: bool | None,
) -> None:
    """On a slow link requests wait, take turns and come back; their answers do not change.

    Nor do they where steps load in bursts, because of what copies take from the compute.
    """
    setup = replace(scarce, target=0.01, emulated_link_gbps=link_gbps, limit_contention=contention)
    pie, stock = both(engines, setup, ample, [request(t, max_tokens=ANSWER) for t in texts])
    assert pie["left_out"] > 0
    assert tokens(pie) == tokens(stock)


def test_aborts_change_no_other_request(
    engines: Engines, ample: Setup, scarce: Setup, texts: list[str]
) -> None:
    """Requests aborted in prefill, while decoding and while waiting leave the others exact."""
    requests = [
        request(t, max_tokens=ANSWER, abort_at=1 + i * 2 if i % 3 == 1 else None)
        for i, t in enumerate(texts)
    ]
    pie, stock = both(engines, scarce, ample, requests)
    gone = [i for i, answer in enumerate(tokens(pie)) if answer is None]
    assert len(gone) >= 8
    assert all(requests[i]["abort_at"] is not None for i in gone)
    kept = [i for i in range(len(requests)) if i not in gone]
    assert [tokens(pie)[i] for i in kept] == [tokens(stock)[i] for i in kept]


def test_structured_output(engines: Engines, ample: Setup, scarce: Setup, texts: list[str]) -> None:
    """Grammars hold over pooled blocks: choice, regex and JSON, beside free text."""
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["ring", "pool"]}, "full": {"type": "boolean"}},
        "required": ["kind", "full"],
        "additionalProperties": False,
    }
    kinds: list[Record] = [
        {"choice": ["resident", "pooled"]},
        {"regex": "[a-z]{3}-[0-9]{4}"},
        {"json": schema},
    ]
    requests = [
        request(t, max_tokens=ANSWER)
        if i % 4 == 3
        else request(t, max_tokens=ANSWER, ignore_eos=False, structured=kinds[i % 4])
        for i, t in enumerate(texts)
    ]
    pie, stock = both(engines, scarce, ample, requests)
    assert tokens(pie) == tokens(stock)
    for i, answer in enumerate(pie["answers"]):
        (text,) = answer["texts"]
        if i % 4 == 0:
            assert text in ("resident", "pooled")
        elif i % 4 == 1:
            assert re.fullmatch("[a-z]{3}-[0-9]{4}", text)
        elif i % 4 == 2:
            assert set(json.loads(text)) == {"kind", "full"}


def test_prefix_cache_and_second_round(engines: Engines, ample: Setup, cached: Setup) -> None:
    """A shared system prompt, then the same chats with their answers and a next question."""
    system = f"<|im_start|>system\n{facts(77, 12)}<|im_end|>\n"
    first = [system + text for text in chats(32, 1, 5)]
    requests = [request(t, max_tokens=ANSWER) for t in first]
    pie, stock = both(engines, cached, ample, requests, reset_prefix_cache=True)
    assert tokens(pie) == tokens(stock)
    assert sum(answer["cached_tokens"] > 0 for answer in pie["answers"]) >= 16

    second = [
        text + answer["texts"][0] + "<|im_end|>\n" + user(f"Go on with {i}.")
        for i, (text, answer) in enumerate(zip(first, stock["answers"], strict=True))
    ]
    pie, stock = both(engines, cached, ample, [request(t, max_tokens=ANSWER) for t in second])
    assert tokens(pie) == tokens(stock)
    shared = min(answer["cached_tokens"] for answer in pie["answers"])
    longest = max(answer["cached_tokens"] for answer in pie["answers"])
    assert 0 < shared < longest, "some chats must find more than the system prompt"


def test_priorities(engines: Engines, ample: Setup, cached: Setup, texts: list[str]) -> None:
    """Requests of low priority are preempted, never those of high priority; all stay exact."""
    chosen = list(enumerate(texts[:24]))
    requests = [request(t, max_tokens=2 * ANSWER, priority=-i) for i, t in chosen]
    pie, stock = both(engines, cached, ample, requests, reset_prefix_cache=True)
    assert pie["preempted"]
    assert min(pie["preempted"]) > -18
    assert tokens(pie) == tokens(stock)


def test_several_seeded_samples(engines: Engines, few: Path, texts: list[str]) -> None:
    """``n > 1``: all samples of a seeded request are stock's.

    Prompts are not chunked: vLLM on CPU cannot chunk prompts of seeded requests.
    """
    other = {"enable_chunked_prefill": False, "max_model_len": 256, "max_num_batched_tokens": 256}
    setup = Setup(few, len(LAYERS), 52, 100, dtype="float32", other=other)
    requests = [
        request(t, max_tokens=ANSWER, n=3, seed=i, temperature=0.8, top_p=0.9)
        for i, t in enumerate(texts[:12])
    ]
    pie, stock = both(engines, setup, setup, requests)
    assert all(len(answer) == 3 for answer in tokens(pie))
    assert tokens(pie) == tokens(stock)


def test_logprobs_of_prompts(engines: Engines, few: Path, texts: list[str]) -> None:
    """Logprobs of prompt tokens and answers are bit for bit stock's on the same schedule."""
    setup = Setup(few, len(LAYERS), 20, 80, dtype="float32")
    requests = [request(t, max_tokens=16, logprobs=3, prompt_logprobs=2) for t in texts[:10]]
    (pie,), (stock,) = engines.both(setup, [round_(requests)])
    assert pie["schedule"] == stock["schedule"]
    assert all(answer["prompt_logprobs"] for answer in stock["answers"])
    assert pie["answers"] == stock["answers"]
    check_traffic(pie, setup.page * setup.layers)

"""One load on a family's small model, with stock vLLM and with pie."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.engine import Setup, request, round_
from tests.helpers.engine_load import check_diverse, tokens
from tests.helpers.small_models import FAMILIES, VOCABULARY

REQUESTS = 32
ANSWER = 64
"""Tokens of each answer: two blocks become full while all requests run."""

LONG_ANSWER = 160
"""Tokens of an answer whose request may be preempted after three blocks of it."""

SAME_TAIL = 16
"""Last tokens of every prompt, the same in all: what differs lies further back."""

STOCK_BYTES = 96 << 20
"""KV memory of stock: never full."""

SPARE = 12
"""Resident blocks beyond what is known to be needed: prompt chunks of two steps, the null block."""

POOLED_KINDS = ("FullAttentionSpec", "MLAAttentionSpec", "UniformTypeKVCacheSpecs")
"""Kinds of KV cache groups that keep all blocks of a request alive."""


def prompts() -> list[list[int]]:
    """Random tokens of different lengths, and the same last ones."""
    chance = random.Random(5)

    def some(count: int) -> list[int]:
        return [chance.randrange(3, VOCABULARY) for _ in range(count)]

    tail = some(SAME_TAIL)
    return [some(80 + i * 5 % 60) + tail for i in range(REQUESTS)]


def rounds() -> list[dict[str, Any]]:
    """Greedy requests that all run at once."""
    return [round_([request(prompt, max_tokens=ANSWER) for prompt in prompts()])]


def returning_rounds() -> list[dict[str, Any]]:
    """Some prompts, and requests that begin with these and others.

    Few come first and ask for one token, so that what is cached of their windows is still there.
    """
    first = [request(prompt, max_tokens=1) for prompt in prompts()[: REQUESTS // 3]]
    longer = [prompt + prompt[:SAME_TAIL] for prompt in prompts()]
    return [round_(first), round_([request(prompt, max_tokens=ANSWER) for prompt in longer])]


def next_turns(first: dict[str, Any]) -> list[dict[str, Any]]:
    """Other prompts, chats, other prompts again, and the next turns of these chats.

    The others take the memory that what is cached of the chats was in.

    Args:
        first: stock's record of ``rounds``, whose answers are in the next turns.
    """
    chance = random.Random(11)
    others = [[chance.randrange(3, VOCABULARY) for _ in prompt] for prompt in prompts()]
    turns = [
        [*prompt, *answer, 7, 9, 11]
        for prompt, (answer,) in zip(prompts(), tokens(first), strict=True)
    ]
    return [
        round_([request(prompt, max_tokens=1) for prompt in others]),
        *rounds(),
        round_([request(prompt, max_tokens=ANSWER) for prompt in others]),
        round_([request(prompt, max_tokens=ANSWER) for prompt in turns]),
    ]


def long_rounds() -> list[dict[str, Any]]:
    """The same prompts with long answers."""
    return [round_([request(prompt, max_tokens=LONG_ANSWER) for prompt in prompts()])]


def stock_setup(name: str, folder: Path) -> Setup:
    """Settings with memory for all."""
    found = _setup(name, folder, layers=1, resident=1, pooled=1, page_bytes=1)
    return replace(found, other={"kv_cache_memory_bytes": STOCK_BYTES, **found.other})


def pie_setup(name: str, folder: Path, stock: dict[str, Any], **more: Any) -> Setup:
    """Settings with which pie has to pool, by what stock needed for the same load.

    Resident are the blocks that cannot be pooled, and the last block of each request.

    Args:
        name: of the family.
        folder: of its model.
        stock: record of stock's run.
        more: further fields of the settings.
    """
    groups = stock["groups"]
    most = [max(steps) for steps in zip(*stock["group_blocks"], strict=True)]
    window = sum(most[i] for i in _pooled_groups(stock))
    full = [groups[i] for i in _pooled_groups(stock)]
    return _setup(
        name,
        folder,
        layers=max(group["layers"] for group in groups),
        resident=sum(most) - window + REQUESTS + SPARE,
        pooled=max(window, 1),
        slots=max(1, min(2, sum(group["layers"] for group in full) - 1)),
        block_size=full[0]["block_size"] if full else FAMILIES[name].block_size,
        page_bytes=max(group["page_bytes"] for group in groups),
        **more,
    )


def unknown_setup(name: str, folder: Path) -> Setup:
    """Settings of pie for a family that is refused before its sizes are looked at."""
    return _setup(name, folder, layers=4, resident=64, pooled=64, slots=1, page_bytes=1 << 14)


def _setup(name: str, folder: Path, **sizes: Any) -> Setup:
    """Settings of these sizes, with what the family needs."""
    family = FAMILIES[name]
    settings = {"block_size": family.block_size, "dtype": family.dtype, "other": family.engine}
    return Setup(folder, **{**settings, **sizes})


def _pooled_groups(record: dict[str, Any]) -> list[int]:
    return [i for i, group in enumerate(record["groups"]) if group["kind"] in POOLED_KINDS]


def pooled_at_peak(pie: dict[str, Any]) -> tuple[int, int]:
    """Pooled blocks at their peak, and all blocks of full attention in the same step."""
    (peak, _), by_group = max(zip(pie["blocks"], pie["group_blocks"], strict=True))
    return peak, sum(by_group[i] for i in _pooled_groups(pie))


def check_same(pie: dict[str, Any], stock: dict[str, Any], setup: Setup) -> None:
    """Assert that pie's tokens are stock's, that answers differ, and that most KV was pooled."""
    if setup.dtype != "float32":  # There other batches mean other rounding, in stock too.
        assert pie["schedule"] == stock["schedule"]
    wrong = sum(p != s for p, s in zip(tokens(pie), tokens(stock), strict=True))
    assert wrong == 0, f"{wrong} of {REQUESTS} answers are not stock's"
    check_diverse(stock)
    assert len({tuple(choices[0]) for choices in tokens(stock)}) == REQUESTS
    peak, full = pooled_at_peak(pie)
    assert peak * 2 > full, f"{peak} of {full} blocks pooled"
    moved = pie["moved"]
    assert moved == pie["implied"]
    assert min(moved["bytes_loaded"], moved["bytes_stored"], pie["relabelled"]) > 0


def with_prefix_caching(setup: Setup, chunk: int | None = None) -> Setup:
    """These settings, and prefix caching; prompts in chunks of so many tokens, if at all."""
    more: dict[str, Any] = {"enable_prefix_caching": True}
    if chunk:
        more["long_prefill_token_threshold"] = chunk
    return replace(setup, other=setup.other | more)


def check_returning(pie: list[dict[str, Any]], stock: list[dict[str, Any]]) -> None:
    """Assert that prompts which come back find KV and have stock's tokens, out of the pool too."""
    wrong = sum(tokens(mine) != tokens(right) for mine, right in zip(pie, stock, strict=True))
    assert wrong == 0, "answers to prompts that come back are not stock's"
    assert sum(answer["cached_tokens"] for answer in pie[1]["answers"]) > 0, "nothing was found"
    assert pie[1]["moved"]["bytes_loaded"] > 0, "nothing was loaded"


def check_next_turns(pie: list[dict[str, Any]], stock: list[dict[str, Any]]) -> None:
    """Assert stock's tokens, and that nothing of the first turns is computed again."""
    for mine, right in zip(pie, stock, strict=True):
        assert tokens(mine) == tokens(right), "answers are not stock's"
    check_found(pie)


def check_found(pie: list[dict[str, Any]]) -> None:
    """Assert that next turns compute no token of their chats' first ones."""
    for before, answer in zip(pie[1]["answers"], pie[3]["answers"], strict=True):
        computed = before["prompt_tokens"] + len(before["tokens"][0]) - 1
        assert answer["cached_tokens"] == computed, "a chat's first turn was computed again"
    assert pie[3]["restored_blocks"] > 2 * REQUESTS, "nothing came out of the pool"


def too_small(setup: Setup) -> Setup:
    """These settings, with half of the pooled blocks."""
    return replace(setup, pooled=setup.pooled // 2)


def check_preempted(pie: dict[str, Any], stock: dict[str, Any]) -> None:
    """Assert that requests were preempted, and have the tokens of stock with memory for all."""
    assert tokens(pie) == tokens(stock), "answers of preempted requests are not stock's"
    assert pie["preempted"], "nobody was preempted"
    assert pie["moved"]["bytes_loaded"] > 0, "nothing was loaded"


def parking(setup: Setup) -> Setup:
    """These settings, with few pooled blocks and rows for all that is preempted."""
    return replace(setup, pooled=setup.pooled * 2 // 3, rows=8 * setup.pooled)


def check_came_back(pie: dict[str, Any], stock: dict[str, Any], block_size: int) -> None:
    """Assert stock's tokens, and that what preempted requests had came back from the pool."""
    check_preempted(pie, stock)
    assert max(pie["decoded"]) >= 3 * block_size, "nobody was preempted after three blocks"
    assert pie["restored_blocks"] > len(pie["preempted"]), "nothing came back"
    assert pie["recomputed_tokens"] == 0, "what was preempted was computed again"

"""Loads on small models with drafters, with stock vLLM and with pie, and what their drafts show.

Equal tokens prove nothing of a drafter's KV: what it proposes wrongly is rejected. So drafts are
compared, one by one, by request and position.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.draft_models import DRAFTERS, make_both, speculative
from tests.helpers.engine import Setup, request, round_
from tests.helpers.engine_load import check_diverse, tokens
from tests.helpers.model_runs import (
    ANSWER,
    REQUESTS,
    SAME_TAIL,
    STOCK_BYTES,
    prompts,
    rounds,
)
from tests.helpers.small_models import FAMILIES

RESIDENT = 2 * REQUESTS + 12
"""Resident blocks: a request may write two at once, that at its end and the one behind it."""

WRONG_AT_ENDS = 0.5
"""Share of the positions round block ends at which a replayed draft is wrong."""

WHOLE_PROMPTS = 8192
"""Tokens of a step, more than all prompts have: vLLM 0.32's V1 runner drafts wrongly behind a part
of a prompt. It takes the prompt's last token for the one behind that part
(``prepare_next_token_ids_padded``, v1/spec_decode/llm_base_proposer.py:1067)."""


def stock_setup(name: str, folder: Path, k: int) -> Setup:
    """Settings of stock with memory for all, and ``k`` draft tokens."""
    model, drafter = make_both(name, folder)
    kind = DRAFTERS[name]
    family = FAMILIES[kind.family]
    other = {
        **family.engine,
        "kv_cache_memory_bytes": STOCK_BYTES,
        "max_num_batched_tokens": WHOLE_PROMPTS,
        "speculative_config": speculative(name, drafter, k),
    }
    other.pop("max_num_scheduled_tokens", None)
    return Setup(
        model,
        layers=1,
        resident=1,
        pooled=1,
        page_bytes=1,
        block_size=family.block_size,
        dtype=family.dtype,
        other=other,
    )


def pie_setup(name: str, stock: Setup, record: dict[str, Any], **more: Any) -> Setup:
    """Settings with which pie pools most blocks, by what stock needed for the same load."""
    (group,) = record["groups"]
    other = {key: value for key, value in stock.other.items() if key != "kv_cache_memory_bytes"}
    sizes: dict[str, Any] = {
        "layers": group["layers"],
        "drafts": DRAFTERS[name].layers,
        "resident": RESIDENT,
        "pooled": max(blocks for (blocks,) in record["group_blocks"]),
        "slots": 2,
        "page_bytes": group["page_bytes"],
        "other": other,
    }
    return replace(stock, **{**sizes, **more})


def small_window(setup: Setup) -> Setup:
    """These settings with half of the pooled ids: requests are preempted, and parked."""
    return replace(setup, pooled=setup.pooled // 2, rows=2 * setup.pooled)


def with_prefix_caching(setup: Setup) -> Setup:
    """These settings, and prefix caching."""
    return replace(setup, other=setup.other | {"enable_prefix_caching": True})


def replayed_rounds(stock: dict[str, Any], block_size: int) -> list[dict[str, Any]]:
    """The load again, with stock's answers as drafts, of which some at block ends are wrong."""
    chance = random.Random(7)
    asked = prompts()
    answers = [choices[0] for choices in tokens(stock)]
    known = [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]
    ends = (at + by for at in range(0, max(map(len, known)), block_size) for by in (-2, -1, 0, 1))
    wrong = [position for position in ends if chance.random() < WRONG_AT_ENDS]
    (again,) = rounds()
    return [{**again, "replay": {"tokens": known, "wrong": wrong}}]


def returning_rounds() -> list[dict[str, Any]]:
    """All prompts, and then all of them again with more behind."""
    longer = [prompt + prompt[:SAME_TAIL] for prompt in prompts()]
    return [*rounds(), round_([request(prompt, max_tokens=ANSWER) for prompt in longer])]


def whole_prompts(record: dict[str, Any]) -> set[int]:
    """Numbers of the requests whose prompts were computed in one step each."""
    first: dict[int, int] = {}
    for step in record["schedule"]:
        for number, count in step:
            first.setdefault(number, count)
    prompts = [a["prompt_tokens"] - (a["cached_tokens"] or 0) for a in record["answers"]]
    return {number for number, count in first.items() if count == prompts[number]}


def drafts_of(record: dict[str, Any]) -> dict[tuple[int, int], list[int]]:
    """Drafts by request and number of its tokens, of requests with whole prompts."""
    whole = whole_prompts(record)
    return {(n, at): drafts for n, at, drafts in record["proposed"] if n in whole}


def wrong_drafts(
    pie: dict[str, Any], stock: dict[str, Any], before: Sequence[dict[str, Any]] = ()
) -> tuple[int, int]:
    """Number of drafts at the same place in both runs that differ, and of all such places.

    Args:
        pie: record of pie's run.
        stock: record of stock's.
        before: records of rounds with the same prompts whose KV is found again: those that were
            computed in parts do not count.
    """
    mine, right = drafts_of(pie), drafts_of(stock)
    whole = set(range(REQUESTS)).intersection(*map(whole_prompts, before))
    both = {place for place in mine.keys() & right.keys() if place[0] in whole}
    return sum(mine[place] != right[place] for place in both), len(both)


def accepted_length(record: dict[str, Any]) -> float:
    """Mean number of tokens that a step gives a request that decodes, after its first token."""
    steps = sum(len(step) for step in record["schedule"])
    answers = sum(len(choice) for choices in tokens(record) for choice in choices)
    return answers / steps


def check_same_drafts(
    pie: dict[str, Any],
    stock: dict[str, Any],
    *,
    mostly_pooled: bool = True,
    before: Sequence[dict[str, Any]] = (),
) -> None:
    """Assert that tokens and drafts are stock's, and that most KV was pooled.

    Where requests wait for another, their steps differ, and so do the places where they draft.
    ``before`` is as ``wrong_drafts`` takes it.
    """
    wrong = sum(p != s for p, s in zip(tokens(pie), tokens(stock), strict=True))
    assert wrong == 0, f"{wrong} of {REQUESTS} answers are not stock's"
    check_diverse(stock)
    wrong, places = wrong_drafts(pie, stock, before)
    assert wrong == 0, f"{wrong} of {places} drafts are not stock's"
    made = len(stock["proposed"])
    assert places * 2 > made, f"only {places} of {made} drafts compared"
    peak, used = max(pie["blocks"])
    assert not mostly_pooled or peak * 2 > used, f"{peak} of {used} blocks pooled"
    assert pie["relabelled"] > 0

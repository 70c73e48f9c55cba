"""Chats of two turns, as token ids: text would not be cut into the same tokens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.engine import Engines, Setup, round_
from tests.helpers.engine_load import check_traffic, tokens

Record = dict[str, Any]


def encoded(model: Path, texts: list[str]) -> list[list[int]]:
    """Texts as token ids of a model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [list(tokenizer.encode(text).ids) for text in texts]


def two_turns(
    engines: Engines, ample: Setup, first: list[Record]
) -> tuple[list[Record], list[Record]]:
    """Rounds of both turns, and stock's records of them.

    The second turn has the first, stock's answer and a next question.
    """
    rounds = [round_(first)]
    (one,) = engines.run(ample, rounds, "stock")
    question = first[0]["prompt"][:20]
    second = [
        {**turn, "prompt": [*turn["prompt"], *answer, 100 + i, *question]}
        for i, (turn, (answer,)) in enumerate(zip(first, tokens(one), strict=True))
    ]
    rounds.append(round_(second))
    return rounds, [one, *engines.run(ample, rounds[1:], "stock")]


def check_found(setup: Setup, first: Record, second: Record) -> None:
    """Assert that each chat of the second turn found all full blocks of its first."""
    for before, answer in zip(first["answers"], second["answers"], strict=True):
        known = before["prompt_tokens"] + len(before["tokens"][0]) - 1
        assert answer["cached_tokens"] >= known // setup.block_size * setup.block_size


def check_kept(setup: Setup, pie: list[Record], stock: list[Record]) -> None:
    """Assert that both turns had preemptions and computed nothing again, with stock's tokens."""
    for record, right in zip(pie, stock, strict=True):
        assert record["preempted"]
        assert tokens(record) == tokens(right)
        assert record["recomputed_tokens"] == 0
        check_traffic(record, setup.page * setup.layers)
    check_found(setup, *pie)

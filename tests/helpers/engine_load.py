"""Loads for the end-to-end tests, made by formula, and what must hold of two records."""

from __future__ import annotations

from typing import Any

END = "<|im_end|>\n"


def user(text: str) -> str:
    """One turn of a chat, up to where the answer begins."""
    return f"<|im_start|>user\n{text}{END}<|im_start|>assistant\n"


def facts(number: int, count: int) -> str:
    """``count`` short sentences, about 9 tokens each, different for each number."""
    return " ".join(f"Item {j} costs {(number * 37 + j * j * 11) % 1000}." for j in range(count))


def chats(count: int, sentences: int, spread: int) -> list[str]:
    """Chats of different lengths: ``sentences`` plus 0 to ``spread`` sentences each."""
    return [user(f"Chat {i}. {facts(i, sentences + i * 5 % (spread + 1))}") for i in range(count)]


def ngram(drafts: int) -> dict[str, Any]:
    """Arguments of a server that proposes what followed the last tokens before."""
    config = {
        "method": "ngram",
        "num_speculative_tokens": drafts,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
    return {"speculative_config": config}


def tokens(record: dict[str, Any]) -> list[Any]:
    """The tokens of each answer, None where the request was aborted."""
    return [answer and answer["tokens"] for answer in record["answers"]]


def check_traffic(record: dict[str, Any], block_bytes: int) -> None:
    """Assert that the engine moved what the plans imply, in whole blocks, and not nothing."""
    moved = record["moved"]
    assert moved == record["implied"]
    for name in ("bytes_loaded", "bytes_stored"):
        assert moved[name] > 0, name
        assert moved[name] % block_bytes == 0, name
    assert record["relabelled"] > 0


def check_mostly_pooled(record: dict[str, Any]) -> None:
    """Assert that at the peak most blocks in use were pooled."""
    pooled, used = max(record["blocks"])
    assert pooled * 2 > used, f"{pooled} of {used} blocks pooled"


def check_diverse(record: dict[str, Any]) -> None:
    """Assert that answers are not degenerate: equal answers must mean something."""
    answers = [choice for answer in tokens(record) if answer for choice in answer]
    different = {tuple(answer) for answer in answers}
    assert len(different) > len(answers) * 3 // 4
    assert sum(len(set(a)) for a in answers) > sum(map(len, answers)) // 4

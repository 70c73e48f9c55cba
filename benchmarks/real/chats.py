"""Drives streaming chats through the OpenAI client and times every piece of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from benchmarks.harness.load import Load
from benchmarks.harness.stats import percentile

REQUEST_SECONDS = 600.0


@dataclass(frozen=True)
class ChatTimes:
    """When the pieces of one answer came, in seconds after the load began.

    Attributes:
        sent: time at which the request left.
        pieces: times of the streamed pieces of text; mostly one token a piece.
        tokens: number of tokens of the answer, by the server's count.
    """

    sent: float
    pieces: tuple[float, ...]
    tokens: int

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.pieces[0] - self.sent

    @property
    def per_token(self) -> float:
        """Time per token after the first one."""
        return (self.pieces[-1] - self.pieces[0]) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class LoadTimes:
    """What one load showed, seen from its clients."""

    seconds: float
    chats: tuple[ChatTimes, ...]

    def summary(self) -> dict[str, float]:
        """Throughput, and percentiles in milliseconds.

        TTFT and TPOT are per chat; ITL is the gap between two pieces of one chat, so a stall
        shows in its p99 also where the mean of the chat hides it.
        """
        first = [chat.first * 1e3 for chat in self.chats]
        per_token = [chat.per_token * 1e3 for chat in self.chats]
        gaps = [
            (after - before) * 1e3
            for chat in self.chats
            for before, after in zip(chat.pieces, chat.pieces[1:], strict=False)
        ]
        tokens = sum(chat.tokens for chat in self.chats)
        return {
            "tok_s": tokens / self.seconds,
            "tokens": tokens,
            "seconds": self.seconds,
            "ttft_p50_ms": percentile(first, 50),
            "ttft_p99_ms": percentile(first, 99),
            "tpot_p50_ms": percentile(per_token, 50),
            "tpot_p99_ms": percentile(per_token, 99),
            "itl_p50_ms": percentile(gaps, 50),
            "itl_p99_ms": percentile(gaps, 99),
        }


async def _chat(
    client: AsyncOpenAI,
    model: str,
    prompt: str,
    tokens: int,
    begin: float,
    on_piece: Callable[[], None],
) -> ChatTimes:
    sent = time.monotonic() - begin
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0.0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "min_tokens": tokens},
    )
    pieces: list[float] = []
    counted = 0
    async for chunk in stream:
        if chunk.usage is not None:
            counted = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(time.monotonic() - begin)
            on_piece()
    if counted != tokens or not pieces:
        raise RuntimeError(f"a chat ended after {counted} of {tokens} tokens")
    return ChatTimes(sent, tuple(pieces), counted)


async def _drive(url: str, model: str, load: Load, on_piece: Callable[[], None]) -> LoadTimes:
    # trust_env: a proxy set for the package index must not see loopback traffic.
    transport = DefaultAsyncHttpxClient(timeout=REQUEST_SECONDS, trust_env=False)
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=transport
    ) as client:
        begin = time.monotonic()
        chats = await asyncio.gather(
            *(
                _chat(client, model, prompt, load.tokens, begin, on_piece)
                for prompt in load.prompts()
            )
        )
        return LoadTimes(time.monotonic() - begin, tuple(chats))


def drive(
    url: str, model: str, load: Load, on_piece: Callable[[], None] = lambda: None
) -> LoadTimes:
    """Stream all chats of `load` at once from the server at `url`.

    Args:
        url: address of the server, without /v1.
        model: the name that the server knows the model by.
        load: the chats.
        on_piece: called at each streamed piece, for a progress display.

    Raises:
        RuntimeError: a chat ended early, with too few tokens.
    """
    return asyncio.run(_drive(url, model, load, on_piece))

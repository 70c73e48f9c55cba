"""Clients that stream, abort, sample and ask too much."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain, count, takewhile
from typing import Any, TypeVar

import httpx
from openai import APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from benchmarks.harness.load import Load

SERVED_NAME = "model"
CLIENTS = 32
TOKENS = 64
INTERRUPTED_TOKENS = 256
"""So many that no stream has ended when it is interrupted, however slow the machine is to do so."""

SAMPLES = 2
"""Choices of a sampled request."""

REQUEST_SECONDS = 300.0
LOAD_SECONDS = 600.0
"""Limits, not measures: a busy machine is many times slower than an idle one."""

COLOURS = ["blue", "red", "green"]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}, "bright": {"type": "boolean"}},
    "required": ["colour", "bright"],
    "additionalProperties": False,
}
T = TypeVar("T")
PROMPTS = Load(chats=CLIENTS).prompts()


@dataclass
class Answer:
    """What a client got: the token ids of each choice, and how each choice ended.

    Attributes:
        client: number of the client, and so of its prompt.
        kind: "greedy", "sampled" or "aborted".
        tokens: ids by choice.
        finished: finish reason by choice.
        error: what the server or the connection said instead.
        asked: tokens of each choice that were asked for.
    """

    client: int
    kind: str
    tokens: list[list[int]] = field(default_factory=list)
    finished: list[str | None] = field(default_factory=list)
    error: str | None = None
    asked: int = TOKENS

    @property
    def complete(self) -> bool:
        """Whether all choices have the number of tokens that was asked for."""
        return self.error is None and all(
            len(ids) == self.asked and end == "length"
            for ids, end in zip(self.tokens, self.finished, strict=True)
        )


@dataclass(frozen=True)
class Traffic:
    """What came of a load, of a prompt too long, and of a request for JSON amid the load."""

    answers: list[Answer]
    too_long: tuple[int, str]
    structured: str


def differing(answers: list[Answer]) -> list[tuple[Answer, Answer]]:
    """Pairs of greedy answers to one prompt of which the shorter does not begin the longer.

    The shorter ones are what clients had that hung up.
    """
    longest: dict[int, Answer] = {}
    greedy = [answer for answer in answers if answer.kind != "sampled" and answer.tokens]
    for answer in greedy:
        known = longest.setdefault(answer.client, answer)
        if len(answer.tokens[0]) > len(known.tokens[0]):
            longest[answer.client] = answer
    return [
        (answer, best)
        for answer in greedy
        if (best := longest[answer.client]).tokens[0][: len(answer.tokens[0])] != answer.tokens[0]
    ]


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[AsyncOpenAI]:
    # trust_env: a proxy set for the package index must not see loopback traffic.
    transport = DefaultAsyncHttpxClient(timeout=REQUEST_SECONDS, trust_env=False)
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=transport
    ) as client:
        yield client


async def _ask(
    client: AsyncOpenAI,
    number: int,
    kind: str = "greedy",
    *,
    tokens: int = TOKENS,
    pieces: int | None = None,
    on_piece: Callable[[], None] = lambda: None,
) -> Answer:
    """Stream one answer; with `pieces` the client hangs up after so many of them."""
    sampled = kind == "sampled"
    choices = SAMPLES if sampled else 1
    answer = Answer(number, kind, [[] for _ in range(choices)], [None] * choices, asked=tokens)
    stream = await client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": PROMPTS[number]}],
        temperature=0.8 if sampled else 0.0,
        seed=number,
        n=choices,
        max_tokens=tokens,
        stream=True,
        extra_body={"ignore_eos": True, "min_tokens": tokens, "return_token_ids": True},
    )
    try:
        count = 0
        async for chunk in stream:
            for choice in chunk.choices:
                answer.tokens[choice.index] += getattr(choice, "token_ids", None) or []
                answer.finished[choice.index] = choice.finish_reason
                count += 1
                on_piece()
            if pieces is not None and count >= pieces:
                break
    finally:
        await stream.close()
    return answer


def _behaviour(number: int, turn: int) -> tuple[str, int | None]:
    """What client `number` does in its turn: seeded, so that every run does the same."""
    rng = random.Random(f"{number}/{turn}")
    draw = rng.random()
    if draw < 0.25:
        return "aborted", rng.randrange(1, TOKENS // 2)
    return ("sampled" if draw < 0.33 else "greedy"), None


async def _turns(client: AsyncOpenAI, number: int, turns: Iterator[int]) -> list[Answer]:
    answers: list[Answer] = []
    for turn in turns:
        kind, pieces = _behaviour(number, turn)
        try:
            answers.append(await _ask(client, number, kind, pieces=pieces))
        except OpenAIError as error:
            answers.append(Answer(number, kind, error=repr(error)))
    return answers


async def _ask_too_much(client: AsyncOpenAI) -> tuple[int, str]:
    """Ask with a prompt longer than the model's longest context; status and message."""
    try:
        await client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": "sand and salt, " * 400}],
            max_tokens=TOKENS,
        )
    except APIStatusError as error:
        return error.status_code, error.message
    return 200, ""


async def _ask_for_json(client: AsyncOpenAI) -> str:
    """Ask for JSON of a given schema."""
    answer = await client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": "Which colour has the sky?"}],
        max_tokens=TOKENS,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "sky", "schema": SCHEMA, "strict": True},
        },
    )
    return answer.choices[0].message.content or ""


def _run(url: str, work: Callable[[AsyncOpenAI], Coroutine[Any, Any, T]], seconds: float) -> T:
    async def main() -> T:
        async with _client(url) as client:
            return await asyncio.wait_for(work(client), seconds)

    return asyncio.run(main())


def load(url: str, turns: range) -> Traffic:
    """32 clients at once, each with its own prompt, for some turns; and the odd requests."""

    async def work(client: AsyncOpenAI) -> Traffic:
        too_long = asyncio.create_task(_ask_too_much(client))
        structured = asyncio.create_task(_ask_for_json(client))
        answers = await asyncio.gather(
            *(_turns(client, number, iter(turns)) for number in range(CLIENTS))
        )
        return Traffic(list(chain.from_iterable(answers)), await too_long, await structured)

    return _run(url, work, LOAD_SECONDS)


def load_for(url: str, seconds: float) -> list[Answer]:
    """32 clients at once that go on asking for some seconds."""
    begin = time.monotonic()

    async def work(client: AsyncOpenAI) -> list[Answer]:
        def turns() -> Iterator[int]:
            return takewhile(lambda _: time.monotonic() - begin < seconds, count())

        answers = await asyncio.gather(
            *(_turns(client, number, turns()) for number in range(CLIENTS))
        )
        return list(chain.from_iterable(answers))

    return _run(url, work, seconds + LOAD_SECONDS)


def alone(url: str, number: int) -> Answer:
    """The greedy answer to a client's prompt while nothing else runs."""
    return _run(url, lambda client: _ask(client, number), LOAD_SECONDS)


def interrupted(url: str, strike: Callable[[], None], seconds: float) -> list[Answer]:
    """Stream to 32 clients, `strike` amid the streams, and see what becomes of each.

    Raises:
        TimeoutError: a client still waits for its stream `seconds` after the strike.
    """

    async def work(client: AsyncOpenAI) -> list[Answer]:
        streaming = asyncio.Event()
        pieces = 0

        def on_piece() -> None:
            nonlocal pieces
            pieces += 1
            if pieces >= 4 * CLIENTS:
                streaming.set()

        async def one(number: int) -> Answer:
            try:
                return await _ask(client, number, tokens=INTERRUPTED_TOKENS, on_piece=on_piece)
            except (OpenAIError, httpx.HTTPError) as error:
                return Answer(number, "greedy", error=repr(error))

        tasks = [asyncio.create_task(one(number)) for number in range(CLIENTS)]
        await asyncio.wait_for(streaming.wait(), LOAD_SECONDS)
        strike()
        return await asyncio.wait_for(asyncio.gather(*tasks), seconds)

    return _run(url, work, 2 * LOAD_SECONDS)

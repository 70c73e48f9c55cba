"""Chats that arrive by themselves or take turns: what is asked of an engine, and when."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

FIRST_TOKEN, LAST_TOKEN = 1000, 40_000
"""Bounds of the token ids of prompts: words of the vocabulary, none special to the engine."""

WORKING_SET = 4
"""KV of all chats that come back together, as a multiple of the device's."""

RATE_SHARE = 1.2
"""Arrivals where requests are to be preempted, as a share of the chats a second that an engine with
memory for all can answer. Above one, for a machine that has become faster since that was found out
would wait for chats, whatever its memory."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        chat: number of the chat that it belongs to.
        turn: number of the chat's turn, from 0.
        due: time at which it is sent, in seconds after the load began.
        prompt: ids of its tokens, all that the chat has said and heard before included.
        tokens: number of tokens of the answer.
    """

    chat: int
    turn: int
    due: float
    prompt: tuple[int, ...]
    tokens: int

    @property
    def name(self) -> str:
        """Name of the request in the engine."""
        return f"{self.chat}-{self.turn}"


class Source(Protocol):
    """Where requests come from."""

    def take(self, now: float) -> Ask | None:
        """The next request that is due, each once; None when there is none now."""

    def next_due(self) -> float | None:
        """When the next one is due; None when that hangs on an answer, or none is left."""

    def answered(self, ask: Ask, tokens: Sequence[int]) -> None:
        """A request has its whole answer."""


def words(seed: str, count: int) -> tuple[int, ...]:
    """Tokens that no other seed gives."""
    rng = random.Random(seed)
    return tuple(rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count))


@dataclass(frozen=True)
class SingleChats:
    """Chats of one turn that share nothing.

    Attributes:
        chats: how many.
        prompt: fewest and most tokens of a prompt.
        answer: the same of an answer.
        seed: seed of the tokens, sizes and times.
    """

    chats: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    seed: int = 0

    def __str__(self) -> str:
        """In words."""
        prompt, answer = (
            str(least) if least == most else f"{least}-{most}"
            for least, most in (self.prompt, self.answer)
        )
        return f"{self.chats} chats of {prompt} + {answer} tokens"

    @property
    def longest(self) -> int:
        """Upper bound on the tokens of a chat at its end."""
        return self.prompt[1] + self.answer[1]

    def asks(self, rate: float | None) -> list[Ask]:
        """All requests in their order: `rate` of them a second, by chance; None is at once."""
        rng = random.Random(self.seed)
        found, due = [], 0.0
        for chat in range(self.chats):
            prompt = words(f"{self.seed}-{chat}", rng.randint(*self.prompt))
            answer = rng.randint(*self.answer)
            gap = rng.expovariate(1.0)
            due += 0.0 if rate is None else gap / rate
            found.append(Ask(chat, 0, due, prompt, answer))
        return found


class Arrivals:
    """Source of requests that come at their times, whatever the engine does."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        """Start with requests in the order of their times."""
        self._left = deque(asks)

    def take(self, now: float) -> Ask | None:
        """See Source."""
        if self._left and self._left[0].due <= now:
            return self._left.popleft()
        return None

    def next_due(self) -> float | None:
        """See Source."""
        return self._left[0].due if self._left else None

    def answered(self, ask: Ask, tokens: Sequence[int]) -> None:
        """See Source."""


@dataclass(frozen=True)
class TurnChats:
    """Chats that come back, each with its history, the answer and a new question.

    Attributes:
        chats: how many.
        turns: number of turns of each chat.
        first: tokens of the first prompt.
        question: tokens of each later one.
        answer: tokens of each answer.
        at_once: how many chats have an answer under way.
        seed: seed of the tokens.
    """

    chats: int
    turns: int
    first: int
    question: int
    answer: int
    at_once: int
    seed: int = 0

    def __str__(self) -> str:
        """In words."""
        return (
            f"{self.chats} chats, {self.first} tokens and {self.turns - 1} times {self.question} "
            f"more, answers of {self.answer}, {self.at_once} at once"
        )

    @property
    def longest(self) -> int:
        """Tokens of a chat at its end."""
        return self.first + self.answer + (self.turns - 1) * (self.question + self.answer)

    @property
    def working_set(self) -> float:
        """Tokens of all chats at the ends of their turns, the mean of all but the first turn."""
        later = range(1, self.turns)
        grown = sum(turn * (self.question + self.answer) for turn in later) / max(1, len(later))
        return self.chats * (self.first + self.answer + grown)

    def outgrowing(self, tokens: int) -> TurnChats:
        """The same chats with first prompts so long that they have WORKING_SET times `tokens`.

        Raises:
            ValueError: there are too many chats for that.
        """
        wanted = WORKING_SET * tokens
        first = self.first + round((wanted - self.working_set) / self.chats)
        if first < self.question:
            raise ValueError(f"{self.chats} chats are too many for {wanted} tokens in all")
        return replace(self, first=first)


class Turns:
    """Source of chats of which each has its turn before any has the next."""

    def __init__(self, load: TurnChats) -> None:
        """Start with the first turn of the first chat."""
        self._load = load
        self._order = deque(itertools.product(range(load.turns), range(load.chats)))
        self._histories: dict[int, tuple[int, ...]] = dict.fromkeys(range(load.chats), ())
        self._under_way: set[int] = set()

    def take(self, now: float) -> Ask | None:
        """See Source."""
        if not self._order or len(self._under_way) >= self._load.at_once:
            return None
        turn, chat = self._order[0]
        if chat in self._under_way:
            return None
        self._order.popleft()
        self._under_way.add(chat)
        load = self._load
        size = load.question if turn else load.first
        said = words(f"{load.seed}-{chat}-{turn}", size)
        return Ask(chat, turn, now, self._histories[chat] + said, load.answer)

    def next_due(self) -> float | None:
        """See Source."""
        return None

    def answered(self, ask: Ask, tokens: Sequence[int]) -> None:
        """See Source."""
        self._histories[ask.chat] = (*ask.prompt, *tokens)
        self._under_way.discard(ask.chat)

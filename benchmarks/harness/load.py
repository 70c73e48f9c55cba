"""The load: chats that differ, a fixed number of greedy tokens each.

Chosen so that one machine of two cores is enough: 32 chats of 300 tokens take about 100 blocks
of 128 tokens, against 40 blocks of device memory.
"""

from __future__ import annotations

from dataclasses import dataclass

TOPICS = (
    "the history of bridges",
    "how bread rises",
    "why the sky is blue",
    "the life of honey bees",
    "how a bicycle stays up",
    "the water cycle",
    "how books were printed",
    "the moons of Jupiter",
    "growing tomatoes",
    "how sails work",
    "the rules of chess",
    "volcanoes",
    "how glass is made",
    "the migration of birds",
    "the invention of paper",
    "how clocks keep time",
)
FORMS = (
    "Write a long and detailed essay about {}.",
    "Tell a long story in which {} plays the main part.",
    "Explain {} to a curious child, step by step and with examples.",
)


COPY = "Copy this text five times. {}"
WORDS = ("apple", "river", "stone", "cloud", "tiger", "piano", "bread", "chair")


def repeated(number: int) -> str:
    """A sentence said six times, another one for each number; the small model goes on with it."""
    word = WORDS[number % len(WORDS)]
    return " ".join([f"The {word} number {number * 37 % 1000} is red."] * 6)


@dataclass(frozen=True)
class Load:
    """A number of chats that start together, and the tokens that each must answer with.

    Attributes:
        chats: number of chats.
        tokens: number of tokens of each answer.
        repeating: whether the chats ask for what they say, again and again, so that n-grams
            foresee most of the answers.
    """

    chats: int = 32
    tokens: int = 300
    repeating: bool = False

    def prompts(self) -> list[str]:
        """The user messages, all different up to `len(TOPICS) * len(FORMS)` chats."""
        if self.repeating:
            return [COPY.format(repeated(index)) for index in range(self.chats)]
        pairs = [form.format(topic) for form in FORMS for topic in TOPICS]
        return [pairs[index % len(pairs)] for index in range(self.chats)]

    @property
    def total_tokens(self) -> int:
        """Tokens that all the answers have together."""
        return self.chats * self.tokens

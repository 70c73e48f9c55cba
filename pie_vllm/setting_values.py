"""Kinds of values that a setting may have: how each is read, and how it is described."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

AUTO = (None, "auto")
"""Spellings of None where pie chooses the value."""

OFF = (False, "off")
"""Spellings of None where it turns something off. YAML reads a bare ``off`` as false."""

UNSET = (None,)
"""Spelling of None where leaving the setting out is the only one."""


@dataclass(frozen=True)
class Values:
    """What a setting may be.

    Attributes:
        wanted: description that completes "it must be ...".
        read: conversion to the value that is used; raises ValueError for any other value.
        none: spellings of None; empty where None is no value.
        metavar: short form for ``--help``; None for a switch, whose flag takes no value.
    """

    wanted: str
    read: Callable[[object], Any]
    none: tuple[object, ...] = ()
    metavar: str | None = None

    def parse(self, value: object) -> Any:
        """The value that is used. Raises ValueError."""
        # Arrays compare by element, so only texts are compared by value.
        if any(value is n or (isinstance(value, str) and value == n) for n in self.none):
            return None
        return self.read(value)

    def spell(self, value: Any) -> Any:
        """A parsed value as users write it: None by its word, where it has one."""
        return self.none_word if value is None and self.none_word else value

    @property
    def none_word(self) -> str | None:
        """The word that stands for None."""
        return next((word for word in self.none if isinstance(word, str)), None)


def number(
    wanted: str, metavar: str, none: tuple[object, ...] = (), maximum: float = sys.float_info.max
) -> Values:
    """A number above 0.

    Args:
        wanted: description with the unit, without the range.
        metavar: name of the unit.
        none: spellings of None.
        maximum: largest number that is accepted.
    """

    def read(value: object) -> float:
        found = _float(value)
        if not 0 < found <= maximum:
            raise ValueError
        return found

    top = "" if maximum == sys.float_info.max else f" and up to {maximum:g}"
    return Values(_or_word(f"{wanted} above 0{top}", none), read, none, metavar)


def share(whole: str, none: tuple[object, ...] = ()) -> Values:
    """A fraction of ``whole``, above 0 and below 1."""

    def read(value: object) -> float:
        found = _float(value)
        if not 0 < found < 1:
            raise ValueError
        return found

    return Values(_or_word(f"a share of {whole} between 0 and 1", none), read, none, "F")


def count(things: str, maximum: int, none: tuple[object, ...] = ()) -> Values:
    """A whole number of ``things`` from 1 to ``maximum``."""

    def read(value: object) -> int:
        found = 0 if isinstance(value, bool) else int(str(value))
        if not 1 <= found <= maximum:
            raise ValueError
        return found

    wanted = f"a whole number of {things}, 1 or more, up to {maximum}"
    return Values(_or_word(wanted, none), read, none, "N")


def choice(names: Sequence[str], none: tuple[object, ...] = ()) -> Values:
    """One of some names."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return str(value)

    words = [*names, *(word for word in none if isinstance(word, str))]
    wanted = " or ".join(repr(word) for word in words)
    return Values(wanted, read, none, f"{{{','.join(words)}}}")


def switch(none: tuple[object, ...] = ()) -> Values:
    """True or false."""

    def read(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Values("true or false", read, none)


def words() -> Values:
    """A list of words; a tuple once it is read."""

    def read(value: object) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise ValueError
        return tuple(value)

    return Values("a list of words", read)


def _float(value: object) -> float:
    """A number, also as text; not a number if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _or_word(wanted: str, none: tuple[object, ...]) -> str:
    return wanted + "".join(f", or {word!r}" for word in none if isinstance(word, str))

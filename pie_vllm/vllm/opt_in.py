"""Opt-in: whether pie is asked for. Every process of vLLM looks, with or without pie."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pie_vllm.config import (
    BLOCK_MANAGER_KEY,
    BLOCK_MANAGERS,
    BY_NAME,
    SETTINGS_KEY,
    SIMILARITY_MIN,
)
from pie_vllm.errors import ConfigError


def wants_pie(additional_config: Any) -> bool:
    """Whether the pie block manager is asked for.

    Raises:
        ConfigError: an unknown block manager, pie's settings without pie, or a misspelt key.
    """
    if not isinstance(additional_config, dict):
        return False
    manager = additional_config.get(BLOCK_MANAGER_KEY, "default")
    if manager is False:  # YAML's off.
        manager = "default"
    if not isinstance(manager, str) or manager not in BLOCK_MANAGERS:
        raise ConfigError(
            f"--block-manager is {manager!r}; valid block managers are {', '.join(BLOCK_MANAGERS)}."
        )
    for key, value in additional_config.items():
        _check_key(key, value, manager == "pie")
    if manager != "pie" and SETTINGS_KEY in additional_config:
        raise ConfigError(
            "settings of the pie block manager were given (--pie-* or "
            f'additional_config["{SETTINGS_KEY}"]) without --block-manager pie. Add '
            "--block-manager pie, or leave them out."
        )
    return bool(manager == "pie")


def _check_key(key: object, value: object, pie: bool) -> None:
    """Refuse a key that was meant for pie and would silently do nothing.

    Keys of others are left alone. Without pie, only keys that begin with "pie" are looked at, and
    those that resemble the block manager's and have the value "pie".

    Raises:
        ConfigError: names the key and the right one.
    """
    if key in (BLOCK_MANAGER_KEY, SETTINGS_KEY):
        return
    letters = _letters(key)
    right = None
    if _resembles(letters, ["blockmanager"]) and (pie or value == "pie"):
        right = f'"{BLOCK_MANAGER_KEY}"'
    elif letters == "pie":
        right = f'"{SETTINGS_KEY}"'
    elif setting := _setting_meant(letters, pie):
        right = f'"{SETTINGS_KEY}": {{"{setting}": ...}}'
    if right:
        raise ConfigError(
            f"additional_config has the key {key!r}, which would do nothing; it must be {right}."
        )


def _setting_meant(letters: str, pie: bool) -> str | None:
    """The setting that a key's letters spell: roughly, after "pie"; exactly, if pie is on."""
    names = {_letters(name): name for name in BY_NAME}
    if letters.startswith("pie"):
        found = _resembles(letters.removeprefix("pie"), list(names))
        return names[found] if found else None
    return names.get(letters) if pie else None


def _resembles(letters: str, words: list[str]) -> str | None:
    """The word that the letters are closest to, if they are close at all."""
    found = get_close_matches(letters, words, n=1, cutoff=SIMILARITY_MIN)
    return found[0] if found else None


def _letters(key: object) -> str:
    return "".join(letter for letter in str(key).lower() if letter.isalpha())

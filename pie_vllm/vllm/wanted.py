"""Whether pie is asked for: what every process of vLLM asks, with or without pie."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from pie_vllm.config import BLOCK_MANAGER_KEY, BLOCK_MANAGERS, SETTINGS_KEY, PieConfig
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
    """Refuse a key that somebody meant for pie, and that would silently do nothing.

    Keys of others are left alone: without pie only those that begin as pie's own do, or that
    give the word "pie" to what is spelt much as the block manager's.
    """
    if key in (BLOCK_MANAGER_KEY, SETTINGS_KEY):
        return
    names = {_squashed(field.name): field.name for field in fields(PieConfig)}
    letters = _squashed(key)
    setting = names.get(letters.removeprefix("pie"))
    right = None
    if get_close_matches(letters, ["blockmanager"], cutoff=0.8) and (pie or value == "pie"):
        right = f'"{BLOCK_MANAGER_KEY}"'
    elif letters == "pie":
        right = f'"{SETTINGS_KEY}"'
    elif setting and (pie or letters.startswith("pie")):
        right = f'"{SETTINGS_KEY}": {{"{setting}": ...}}'
    elif letters.startswith("pie") and get_close_matches(letters[3:], names, cutoff=0.8):
        found = names[get_close_matches(letters[3:], names, cutoff=0.8)[0]]
        right = f'"{SETTINGS_KEY}": {{"{found}": ...}}'
    if right:
        raise ConfigError(
            f"additional_config has the key {key!r}, which would do nothing; it must be {right}."
        )


def _squashed(key: object) -> str:
    return "".join(letter for letter in str(key).lower() if letter.isalpha())

"""Whether pie is asked for: what every process of vLLM asks, with or without pie."""

from __future__ import annotations

from typing import Any

from pie_vllm.config import BLOCK_MANAGER_KEY, BLOCK_MANAGERS, SETTINGS_KEY
from pie_vllm.errors import ConfigError


def wants_pie(additional_config: Any) -> bool:
    """Whether the pie block manager is asked for.

    Raises:
        ConfigError: an unknown block manager, or pie's settings without pie.
    """
    if not isinstance(additional_config, dict):
        return False
    manager = additional_config.get(BLOCK_MANAGER_KEY, "default")
    if manager not in BLOCK_MANAGERS:
        raise ConfigError(
            f"--block-manager is {manager!r}; valid block managers are {', '.join(BLOCK_MANAGERS)}."
        )
    if manager != "pie" and additional_config.get(SETTINGS_KEY):
        raise ConfigError(
            "settings of the pie block manager were given (--pie-* or "
            f'additional_config["{SETTINGS_KEY}"]) without --block-manager pie. Add '
            "--block-manager pie, or leave them out."
        )
    return bool(manager == "pie")

"""How the settings travel inside vLLM's configuration."""

from __future__ import annotations

from typing import Any

from pie_vllm.config import BLOCK_MANAGER_KEY, BLOCK_MANAGERS, SETTINGS_KEY, PieConfig
from pie_vllm.errors import ConfigError
from pie_vllm.policy.detector import Prior
from pie_vllm.policy.geometry import Geometry


class PieSettings(dict[str, Any]):
    """The value of ``additional_config["pie"]`` once it has been checked.

    It is empty as a dict: vLLM hashes ``additional_config`` into the key of its
    compile cache, and sizes of the pool must not cause a compilation.

    Attributes:
        config: the checked settings.
        geometry: the sizes, known once the workers have sized the tiers.
        prior: what the worker with the slowest link measured at start.
    """

    def __init__(self, config: PieConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry: Geometry | None = None
        self.prior = Prior()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the attributes, which a dict subclass would otherwise lose."""
        return (PieSettings, (self.config,), {"geometry": self.geometry, "prior": self.prior})


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


def take(additional_config: dict[str, Any]) -> PieSettings:
    """The checked settings in ``additional_config``. Raises ConfigError."""
    settings = additional_config.get(SETTINGS_KEY)
    if isinstance(settings, PieSettings):
        return settings
    return PieSettings(PieConfig.from_mapping(settings))


def of(vllm_config: Any) -> PieSettings:
    """The checked settings in a finished VllmConfig."""
    settings = vllm_config.additional_config[SETTINGS_KEY]
    assert isinstance(settings, PieSettings)
    return settings

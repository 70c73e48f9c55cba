"""The checked settings inside vLLM's configuration, and with it in every process."""

from __future__ import annotations

from typing import Any

from pie_vllm.config import SETTINGS_KEY, PieConfig
from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior
from pie_vllm.vllm.opt_in import wants_pie

__all__ = ["PieSettings", "of", "take", "wants_pie"]


class PieSettings(dict[str, Any]):
    """Value of ``additional_config["pie"]`` once it has been checked.

    It is empty as a dict: vLLM hashes ``additional_config`` into the key of its
    compile cache, and sizes of the pool must not cause a compilation. ``plugin.engage`` says how
    it is pickled.

    Attributes:
        config: checked settings.
        geometry: sizes of both tiers; None until the workers have chosen them.
        prior: measurements at start by the worker with the slowest link.
    """

    def __init__(self, config: PieConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry: Geometry | None = None
        self.prior = Prior()


def take(additional_config: dict[str, Any]) -> PieSettings:
    """The checked settings in ``additional_config``. Raises ConfigError."""
    settings = additional_config.get(SETTINGS_KEY)
    if isinstance(settings, PieSettings):
        return settings
    return PieSettings(PieConfig.from_mapping(settings))


def of(vllm_config: Any) -> PieSettings:
    """The checked settings in a finished VllmConfig.

    Raises:
        UnsupportedError: the settings are gone, though pie's classes are there.
    """
    settings = (vllm_config.additional_config or {}).get(SETTINGS_KEY)
    if not isinstance(settings, PieSettings):
        raise UnsupportedError(
            f'additional_config["{SETTINGS_KEY}"] is {settings!r} in the finished configuration, '
            "where --block-manager pie had put its checked settings: another plugin has replaced "
            "them. Remove it (VLLM_PLUGINS names the plugins that are loaded), or use "
            "--block-manager default."
        )
    return settings

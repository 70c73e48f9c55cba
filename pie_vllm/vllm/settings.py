"""The checked settings inside vLLM's configuration, and with it in every process."""

from __future__ import annotations

from typing import Any

from pie_vllm.config import SETTINGS_KEY, PieConfig
from pie_vllm.errors import UnsupportedError
from pie_vllm.geometry import Geometry, cdiv
from pie_vllm.plan import Prior
from pie_vllm.vllm.opt_in import wants_pie

__all__ = ["PieSettings", "first_chunks", "of", "take", "wants_pie"]

FIRST_BYTES_MAX = 1 << 30
"""Maximum bytes of the pool that are taken at start where the user does not say how many."""


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


def first_chunks(vllm_config: Any, geometry: Geometry, block_size: int) -> int:
    """Chunks of the pool that are taken at start and never given back.

    By default they hold what one step of prompts can demote, up to ``FIRST_BYTES_MAX``: memory for
    more is ordered two steps ahead, but the first demotions of a small device come sooner than
    that. Workers and scheduler ask here, so that they agree.

    Args:
        vllm_config: the finished configuration.
        geometry: sizes of the tiers.
        block_size: tokens of a block.
    """
    given = of(vllm_config).config.pool_start_gib
    if given is None:
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        rows = min(cdiv(tokens, block_size), geometry.resident_blocks // 2)
        rows = min(rows, FIRST_BYTES_MAX // geometry.row_bytes)
    else:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        rows = cdiv(int(given * 2**30) // ranks, geometry.row_bytes)
    return min(max(1, cdiv(rows, geometry.chunk_rows)), geometry.num_chunks)

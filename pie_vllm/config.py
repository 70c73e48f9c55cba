"""The settings: one table, from which flags, keys, checks, error texts and documentation come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import Parameter, Signature
from typing import Any

from pie_vllm.errors import ConfigError
from pie_vllm.geometry import DEFAULT_RING_SLOTS, RING_FRACTION_MAX
from pie_vllm.setting_values import (
    AUTO,
    OFF,
    UNSET,
    Values,
    choice,
    count,
    number,
    share,
    switch,
    words,
)

BLOCK_MANAGER_KEY = "block_manager"
SETTINGS_KEY = "pie"
BLOCK_MANAGERS = ("default", "pie")
SIMILARITY_MIN = 0.8
"""Similarity from which a name counts as a misspelling of another (``difflib``'s ratio)."""

POOL_GIB_MAX = 2.0**30
"""No machine has so much memory; beyond it numbers of bytes overflow."""

LINK_GBPS_MAX = 1e6
"""No link is so fast."""

RING_SLOTS_MAX = 1 << 20
"""No model has so many layers."""

TARGET_SLOWDOWN_DEFAULT = 0.01
POOL_IDLE_SECONDS_DEFAULT = 60.0


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: key of ``additional_config["pie"]``, keyword of ``engine_args``, field of
            ``PieConfig``.
        values: what it may be.
        default: parsed value where none is given.
        help: what it does, for ``--help`` and ``docs/configuration.md``.
        flag: command line flag, also a YAML key without the dashes; None if it has none.
        old_flag: flag that still works in this release, with a note that names the key.
        section: heading that it stands under in ``docs/configuration.md``.
        unset: what is done without a value, where neither a word nor the default says it.
        removed: values that were accepted once, each with why it is gone and the way out.
    """

    name: str
    values: Values
    default: Any
    help: str
    flag: str | None = None
    old_flag: str | None = None
    section: str = "Settings"
    unset: str = ""
    removed: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name that users know it by: its flag, or else its key."""
        return self.flag or f'additional_config["{SETTINGS_KEY}"]["{self.name}"]'

    @property
    def default_text(self) -> str:
        """The default as users write it, or what is done without a value."""
        if self.unset:
            return self.unset
        spelt = self.values.spell(self.default)
        return str(spelt).lower() if isinstance(spelt, bool) else str(spelt)

    def parse(self, value: object, label: str | None = None) -> Any:
        """The value that is used.

        Args:
            value: what the user gave.
            label: what the user gave it by; the setting's own label if None.

        Raises:
            ConfigError: names the setting, the value and what it must be.
        """
        label = label or self.label
        if isinstance(value, str) and value in self.removed:
            raise ConfigError(f"{label} is {value!r}, which is gone: {self.removed[value]}")
        try:
            return self.values.parse(value)
        except ValueError:
            raise ConfigError(f"{label} is {value!r}; it must be {self.values.wanted}.") from None


ADVANCED = "Advanced settings"
FOR_TESTS = "Settings for tests and emulation"

SETTINGS = (
    Setting(
        "pool_gib",
        number("a number of GiB", "GIB", AUTO, POOL_GIB_MAX),
        None,
        "Upper bound on the CPU memory that pooled KV takes, in GiB, over all ranks of "
        "--tensor-parallel-size together. Memory is taken as needed and given back when idle. "
        "'auto' is the smaller of four times the device's KV bytes and half of the free CPU "
        "memory, by the system's count and the cgroup's limit.",
        flag="--pie-pool-gib",
    ),
    Setting(
        "target_slowdown",
        share("a step's time", OFF),
        TARGET_SLOWDOWN_DEFAULT,
        "How much longer steps may take because of pooled KV, as a share of their time. It counts "
        "waiting for copies and, except on a CPU, what copies take from the compute beside them. "
        "What the link cannot bring within it is not pooled, or its requests take turns. 'off' "
        "pools as much as fits, whatever it costs.",
        flag="--pie-target-slowdown",
    ),
    Setting(
        "parking",
        choice(("lru",), OFF),
        "lru",
        "Which cached KV leaves the pool first when its rows run out. KV whose block gets another "
        "use is kept (parked) in the pool and copied back when a request asks for it: that of "
        "prefixes with prefix caching, that of preempted requests in any case. 'lru' gives up the "
        "least recently used blocks. 'off' parks nothing.",
        flag="--pie-parking",
        removed={
            "arc": "behind the device's prefix cache it found fewer blocks than 'lru' on traces of "
            "real requests. Use 'lru', or leave the setting out."
        },
    ),
    Setting(
        "full_graphs",
        switch(),
        False,
        "Experimental, not yet proven on a GPU. On CUDA, a step that only decodes keeps its FULL "
        "CUDA graph when it loads KV, with the copies inside the graph; without it such steps run "
        "piecewise.",
        flag="--pie-full-graphs",
    ),
    Setting(
        "ring_slots",
        count("slots", RING_SLOTS_MAX, UNSET),
        None,
        "Layers whose pooled pages fit the device at once.",
        old_flag="--pie-ring-slots",
        section=ADVANCED,
        unset=f"{DEFAULT_RING_SLOTS}, or the number of layers if that is less",
    ),
    Setting(
        "ring_fraction",
        share("the device's KV bytes", AUTO),
        None,
        "Share of the device's KV bytes that the ring of pooled pages may take. It bounds how many "
        "blocks can be pooled at once; one request of --max-model-len may raise it. 'auto' is as "
        f"wide as what the link brings in one step, and at most {RING_FRACTION_MAX:g}.",
        old_flag="--pie-ring-fraction",
        section=ADVANCED,
    ),
    Setting(
        "link_gbps",
        number("a speed in GB/s", "GBPS", AUTO, LINK_GBPS_MAX),
        None,
        "Speed from the CPU to the device in GB/s, in place of what is measured at start "
        "('auto'). No more is counted on, so a low value leaves the rest of the link to others.",
        old_flag="--pie-link-gbps",
        section=ADVANCED,
    ),
    Setting(
        "pool_idle_seconds",
        number("a number of seconds", "SECONDS"),
        POOL_IDLE_SECONDS_DEFAULT,
        "Time for which the pool keeps CPU memory that nothing needs.",
        section=ADVANCED,
    ),
    Setting(
        "pool_start_gib",
        number("a number of GiB", "GIB", AUTO, POOL_GIB_MAX),
        None,
        "Part of the pool that is taken and pinned at start and never given back, in GiB, over all "
        "ranks together. No step waits for it, but the start does; the size of the pool, or more, "
        "takes all of it. 'auto' is what one step of prompts can demote, and at most 1 GiB a rank.",
        section=ADVANCED,
    ),
    Setting(
        "limit_contention",
        switch(UNSET),
        None,
        "Whether what copies take from the compute beside them counts as slowdown, or the time "
        "waited for them alone.",
        section=ADVANCED,
        unset="true, but false where copies run on the compute's own cores, as on a CPU",
    ),
    Setting(
        "emulated_link_gbps",
        number("a speed in GB/s", "GBPS", UNSET),
        None,
        "Speed in GB/s, per direction, to which the copies of the host driver are held.",
        section=FOR_TESTS,
        unset="as fast as memory copies are",
    ),
    Setting(
        "debug",
        words(),
        (),
        "Switches of the engine that check it, or break it on purpose.",
        section=FOR_TESTS,
        unset="none",
    ),
)
"""All settings, in the order of the documentation."""

BY_NAME = {setting.name: setting for setting in SETTINGS}


def _default(name: str) -> Any:
    return BY_NAME[name].default


@dataclass(frozen=True)
class PieConfig:
    """Checked settings of the pie block manager: a field for each row of ``SETTINGS``.

    A row says what its setting means. None stands for ``auto`` or ``off``.
    """

    pool_gib: float | None = _default("pool_gib")
    target_slowdown: float | None = _default("target_slowdown")
    parking: str | None = _default("parking")
    full_graphs: bool = _default("full_graphs")
    ring_slots: int | None = _default("ring_slots")
    ring_fraction: float | None = _default("ring_fraction")
    link_gbps: float | None = _default("link_gbps")
    pool_idle_seconds: float = _default("pool_idle_seconds")
    pool_start_gib: float | None = _default("pool_start_gib")
    limit_contention: bool | None = _default("limit_contention")
    emulated_link_gbps: float | None = _default("emulated_link_gbps")
    debug: tuple[str, ...] = _default("debug")

    @classmethod
    def from_mapping(cls, settings: object) -> PieConfig:
        """Check the value of ``additional_config["pie"]``; None is an empty one.

        Raises:
            ConfigError: not a mapping, an unknown key, or a bad value.
        """
        if settings is None:
            settings = {}
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f'additional_config["{SETTINGS_KEY}"] is {settings!r}; it must be a mapping with '
                f"keys among {', '.join(BY_NAME)}."
            )
        unknown = sorted(str(key) for key in settings if key not in BY_NAME)
        if unknown:
            raise ConfigError(_unknown(unknown))
        return cls(
            **{
                name: setting.parse(settings[name])
                for name, setting in BY_NAME.items()
                if name in settings
            }
        )

    @property
    def emulated_link(self) -> float | None:
        """Bytes per second to which the host driver's copies are held."""
        return None if self.emulated_link_gbps is None else self.emulated_link_gbps * 1e9


def _unknown(keys: list[str]) -> str:
    """The error of unknown keys, with the settings that they resemble."""
    close = [get_close_matches(key, BY_NAME, n=1, cutoff=SIMILARITY_MIN) for key in keys]
    meant = ", ".join(name for names in close for name in names)
    return (
        f"unknown pie setting{'s' if len(keys) > 1 else ''} {', '.join(keys)}; "
        f"{f'did you mean {meant}? ' if meant else ''}"
        f"valid settings are {', '.join(BY_NAME)}."
    )


def engine_args(**settings: Any) -> dict[str, Any]:
    """Keyword arguments that make ``vllm.LLM`` use the pie block manager.

    Example: ``LLM(model, **pie_vllm.engine_args(pool_gib=1.0))``.

    Args:
        settings: settings by the names of ``PieConfig``'s fields, with the values that
            ``docs/configuration.md`` lists; None is as if it was left out.

    Raises:
        ConfigError: an unknown name or a bad value.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    PieConfig.from_mapping(given)
    return {"additional_config": {BLOCK_MANAGER_KEY: "pie", SETTINGS_KEY: given}}


vars(engine_args)["__signature__"] = Signature(  # For help() and completion.
    [Parameter(s.name, Parameter.KEYWORD_ONLY, default=s.values.spell(s.default)) for s in SETTINGS]
)

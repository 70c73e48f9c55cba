"""Settings, parsed and checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pie_vllm.errors import ConfigError
from pie_vllm.policy.control.decider import DEFAULT_TARGET_SLOWDOWN
from pie_vllm.policy.control.elastic_pool import DEFAULT_IDLE_SECONDS
from pie_vllm.policy.pool.eviction import DEFAULT_POLICY, POLICIES

BLOCK_MANAGER_KEY = "block_manager"
SETTINGS_KEY = "pie"
BLOCK_MANAGERS = ("default", "pie")

FLAGS = {
    "pool_gib": "--pie-pool-gib",
    "ring_slots": "--pie-ring-slots",
    "ring_fraction": "--pie-ring-fraction",
    "target_slowdown": "--pie-target-slowdown",
    "link_gbps": "--pie-link-gbps",
    "parking": "--pie-parking",
    "full_graphs": "--pie-full-graphs",
}
"""Command line flag of each setting that has one."""


MOST_GIB = 2.0**30
"""No machine has so much memory; beyond it numbers of bytes overflow."""

MOST_GBPS = 1e6
"""No link is so fast."""

MOST_SLOTS = 1 << 20
"""No model has so many layers."""


def _fail(key: str, value: object, wanted: str) -> ConfigError:
    name = FLAGS.get(key, f'additional_config["pie"]["{key}"]')
    return ConfigError(f"{name} is {value!r}; it must be {wanted}.")


def _number(value: object) -> float:
    """A number, also as text; not a number if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _parse_size(key: str, value: object, wanted: str, most: float) -> float | None:
    if value is None or _is(value, "auto"):
        return None
    size = _number(value)
    if not 0 < size <= most:
        raise _fail(key, value, f"{wanted} above 0 and up to {most:g}, or 'auto'")
    return size


def _is(value: object, word: str) -> bool:
    """Whether a value is that word; arrays, which compare by element, are not."""
    return isinstance(value, str) and value == word


def _off(value: object) -> bool:
    """Whether a value says ``off``, which YAML reads as false where it is not quoted."""
    return value is False or _is(value, "off")


def parse_pool_gib(value: object) -> float | None:
    """A pool size in GiB, or None for ``auto``. Raises ConfigError."""
    return _parse_size("pool_gib", value, "a number of GiB", MOST_GIB)


def parse_link_gbps(value: object) -> float | None:
    """A speed in GB/s, or None for ``auto``. Raises ConfigError."""
    return _parse_size("link_gbps", value, "a speed in GB/s", MOST_GBPS)


def parse_ring_slots(value: object) -> int | None:
    """A number of ring slots, or None for the default. Raises ConfigError."""
    if value is None:
        return None
    try:
        slots = int(str(value)) if not isinstance(value, bool) else 0
    except ValueError:
        slots = 0
    if not 1 <= slots <= MOST_SLOTS:
        raise _fail("ring_slots", value, f"a whole number of slots, 1 or more, up to {MOST_SLOTS}")
    return slots


def parse_parking(value: object) -> str | None:
    """A policy of eviction of parked KV, or None for ``off``. Raises ConfigError."""
    if _off(value):
        return None
    if _is(value, "arc"):
        why = "on traces of real requests it found fewer blocks than 'lru'"
        wanted = f"'lru' or 'off': 'arc' was removed, because {why}; use --pie-parking lru"
        raise _fail("parking", value, wanted)
    if not isinstance(value, str) or value not in POLICIES:
        raise _fail("parking", value, f"one of {', '.join(POLICIES)}, or 'off'")
    return str(value)


def _parse_share(key: str, value: object, wanted: str) -> float:
    share = _number(value)
    if not 0 < share < 1:
        raise _fail(key, value, wanted)
    return share


def parse_ring_fraction(value: object) -> float | None:
    """A share of the device's KV bytes, or None for ``auto``. Raises ConfigError."""
    if value is None or _is(value, "auto"):
        return None
    wanted = "a share of the device's KV bytes between 0 and 1, or 'auto'"
    return _parse_share("ring_fraction", value, wanted)


def parse_target_slowdown(value: object) -> float | None:
    """A share of a step's time, or None for ``off``. Raises ConfigError."""
    if _off(value):
        return None
    return _parse_share(
        "target_slowdown", value, "a share of a step's time between 0 and 1, or 'off'"
    )


def parse_full_graphs(value: object) -> bool:
    """Whether steps that load may run in FULL graphs. Raises ConfigError."""
    if isinstance(value, bool):
        return value
    raise _fail("full_graphs", value, "true or false")


@dataclass(frozen=True)
class PieConfig:
    """Settings of the pie block manager.

    Attributes:
        pool_gib: CPU memory for KV in all, GiB; None chooses (``auto``).
        ring_slots: ``B``; None chooses.
        ring_fraction: share of the device's KV bytes that the ring may take; None takes what
            the link can feed (``auto``).
        target_slowdown: time that pooling may cost, as a share of a step's time;
            None pools as much as fits, whatever it costs.
        link_gbps: speed from the CPU to the device, GB/s, in place of what is measured at
            start; no more is counted on later. None measures (``auto``).
        parking: which KV goes first where more would be parked than the pool has rows for: a name
            of ``pie_vllm.policy.pool.eviction.POLICIES``; None parks nothing.
        full_graphs: whether steps that load KV may run in FULL CUDA graphs, with the copies
            inside. Not yet proven on a GPU.
        emulated_link_gbps: speed that the host driver's link is held to, GB/s per direction;
            None is as fast as memory copies are. For tests and emulation.
        limit_contention: whether what copies take from the compute beside them counts as
            slowdown, not the stall alone; None is yes, but no where the copies run on the
            compute's own cores, as on a CPU, whatever the link.
        pool_idle_seconds: how long the pool keeps CPU memory that is not needed.
        debug: switches of the engine that break or check it on purpose.
    """

    pool_gib: float | None = None
    ring_slots: int | None = None
    ring_fraction: float | None = None
    target_slowdown: float | None = DEFAULT_TARGET_SLOWDOWN
    link_gbps: float | None = None
    parking: str | None = DEFAULT_POLICY
    full_graphs: bool = False
    emulated_link_gbps: float | None = None
    limit_contention: bool | None = None
    pool_idle_seconds: float = DEFAULT_IDLE_SECONDS
    debug: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, settings: object) -> PieConfig:
        """Check the value of ``additional_config["pie"]``.

        Raises:
            ConfigError: not a mapping, an unknown key, or a bad value.
        """
        if settings is None:
            settings = {}
        valid = [field.name for field in fields(cls)]
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f'additional_config["pie"] is {settings!r}; it must be a mapping with keys '
                f"among {', '.join(valid)}."
            )
        unknown = sorted(str(key) for key in settings if key not in valid)
        if unknown:
            raise ConfigError(
                f"unknown pie setting{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; "
                f"valid settings are {', '.join(valid)}."
            )
        return cls(
            pool_gib=parse_pool_gib(settings.get("pool_gib")),
            ring_slots=parse_ring_slots(settings.get("ring_slots")),
            ring_fraction=parse_ring_fraction(settings.get("ring_fraction")),
            target_slowdown=parse_target_slowdown(
                settings.get("target_slowdown", DEFAULT_TARGET_SLOWDOWN)
            ),
            link_gbps=parse_link_gbps(settings.get("link_gbps")),
            parking=parse_parking(settings.get("parking", DEFAULT_POLICY)),
            full_graphs=parse_full_graphs(settings.get("full_graphs", False)),
            emulated_link_gbps=_parse_emulated(settings.get("emulated_link_gbps")),
            limit_contention=_parse_limit(settings.get("limit_contention")),
            pool_idle_seconds=_parse_idle(settings.get("pool_idle_seconds", DEFAULT_IDLE_SECONDS)),
            debug=_parse_debug(settings.get("debug", ())),
        )

    @property
    def emulated_link(self) -> float | None:
        """Bytes per second that the host driver's link is held to."""
        return None if self.emulated_link_gbps is None else self.emulated_link_gbps * 1e9

    def to_mapping(self) -> dict[str, Any]:
        """The settings as plain values that ``from_mapping`` takes back."""
        settings = asdict(self)
        settings["debug"] = list(self.debug)
        for name in ("target_slowdown", "parking"):
            if settings[name] is None:
                settings[name] = "off"
        return settings


def _parse_emulated(value: object) -> float | None:
    return None if value is None else _above_zero("emulated_link_gbps", value, "a speed in GB/s")


def _parse_limit(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise _fail("limit_contention", value, "true or false")


def _parse_idle(value: object) -> float:
    return _above_zero("pool_idle_seconds", value, "a number of seconds")


def _above_zero(key: str, value: object, wanted: str) -> float:
    found = _number(value) if isinstance(value, (int, float)) else math.nan
    if not 0 < found < math.inf:
        raise _fail(key, value, f"{wanted} above 0")
    return found


def _parse_debug(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise _fail("debug", value, "a list of words")
    return tuple(value)


def engine_args(
    *,
    pool_gib: float | str | None = None,
    ring_slots: int | None = None,
    ring_fraction: float | str | None = None,
    target_slowdown: float | str | None = None,
    link_gbps: float | str | None = None,
    parking: str | None = None,
    full_graphs: bool | None = None,
    **other: Any,
) -> dict[str, Any]:
    """Keyword arguments that make ``vllm.LLM`` use the pie block manager.

    Example: ``LLM(model, **pie_vllm.engine_args(pool_gib=1.0))``.

    Args:
        pool_gib: CPU memory for KV in all, GiB, or ``"auto"`` (the default).
        ring_slots: layers that the ring holds; default 3.
        ring_fraction: share of the device's KV bytes for the ring, or ``"auto"`` (the
            default): what the link can feed.
        target_slowdown: slowdown allowed as a share of a step's time, or ``"off"``; default 0.01.
        link_gbps: speed from the CPU to the device, GB/s, no more than which is counted on, or
            ``"auto"`` (the default): measured at start.
        parking: policy of eviction of parked KV, ``"lru"``, or ``"off"``.
        full_graphs: whether steps that load KV may run in FULL CUDA graphs; default False.
            Experimental: not yet proven on a GPU.
        other: further keys of ``additional_config["pie"]``.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    settings = {
        key: value
        for key, value in {
            "pool_gib": pool_gib,
            "ring_slots": ring_slots,
            "ring_fraction": ring_fraction,
            "target_slowdown": target_slowdown,
            "link_gbps": link_gbps,
            "parking": parking,
            "full_graphs": full_graphs,
            **other,
        }.items()
        if value is not None
    }
    PieConfig.from_mapping(settings)
    return {"additional_config": {BLOCK_MANAGER_KEY: "pie", SETTINGS_KEY: settings}}

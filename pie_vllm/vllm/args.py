"""The command line flags, and how they reach vLLM's configuration."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pie_vllm.config import (
    BLOCK_MANAGER_KEY,
    BLOCK_MANAGERS,
    FLAGS,
    SETTINGS_KEY,
    parse_link_gbps,
    parse_parking,
    parse_pool_gib,
    parse_ring_fraction,
    parse_ring_slots,
    parse_target_slowdown,
)
from pie_vllm.errors import ConfigError, PieError, UnsupportedError
from pie_vllm.vllm.wanted import wants_pie

logger = logging.getLogger("vllm.pie")

SCHEDULER = "pie_vllm.vllm.scheduler_side.scheduler.make_scheduler"
WORKERS = {
    "cpu": "pie_vllm.vllm.worker_side.cpu_worker.PieCPUWorker",
    "cuda": "pie_vllm.vllm.worker_side.gpu_worker.PieGPUWorker",
}
"""Worker class by kind of device; each is imported on its own platform only."""


def _parsed(parse: Callable[[object], Any]) -> Callable[[str], Any]:
    """An argparse type that words errors as argparse does."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _or(word: str, parse: Callable[[object], Any]) -> Callable[[object], Any]:
    """As ``parse``, which reads ``word`` as None; the word is kept, so that a flag overrides."""

    def convert(value: object) -> Any:
        parsed = parse(value)
        return word if parsed is None else parsed

    return convert


class _Setting(argparse.Action):
    """Stores a flag in ``additional_config`` at once.

    API server processes get the parsed namespace and read it before they load
    plugins (entrypoints/launchers/api_server/entry.py:53), so the setting must
    be where vLLM itself looks.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        setattr(namespace, self.dest, values)
        _merge(namespace)


class _Switch(argparse.BooleanOptionalAction):
    """As ``_Setting``, for a flag that has a ``--no-`` form."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, values, option_string)
        _merge(namespace)


class _Off(argparse.Action):
    """A ``--no-`` form, as vLLM gives on ``off``, ``no`` and ``false`` of a YAML file.

    It drops such a line where there is no flag of that form (utils/argparse_utils.py:620), and
    with it what the user asked for. ``type`` says what false means for the setting, or refuses it.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        means: Any = self.type
        try:
            setattr(namespace, self.dest, means(False))
        except ConfigError as error:
            parser.error(f"{error} (A YAML file's off, no and false are false.)")
        _merge(namespace)


def _add_off(group: Any, flag: str, parse: Callable[[object], Any], spellings: str = "-_") -> None:
    """Add the hidden form of a flag that says false, as a YAML file may spell it."""
    name = flag.removeprefix("--")
    group.add_argument(
        *(f"--no-{name.replace('-', dash)}" for dash in spellings),
        dest=name.replace("-", "_"),
        type=parse,
        nargs=0,
        default=None,
        action=_Off,
        help=argparse.SUPPRESS,
    )


def _merge(namespace: argparse.Namespace) -> None:
    """Write the flags that were given into ``namespace.additional_config``."""
    before = getattr(namespace, "additional_config", None)
    config = dict(before or {})
    manager = getattr(namespace, "block_manager", None)
    if manager == "default":
        config.pop(BLOCK_MANAGER_KEY, None)  # vLLM hashes what is there for its compile cache.
    elif manager is not None:
        config[BLOCK_MANAGER_KEY] = manager
    given = {
        key: value for key in FLAGS if (value := getattr(namespace, f"pie_{key}", None)) is not None
    }
    if given:
        config[SETTINGS_KEY] = {**config.get(SETTINGS_KEY, {}), **given}
    if config != (before or {}):
        namespace.additional_config = config


def _add_flags(parser: Any) -> None:
    group = parser.add_argument_group(
        title="BlockManager", description="Pool CPU memory into the KV cache (pie-vllm)."
    )
    group.add_argument(
        "--block-manager",
        choices=BLOCK_MANAGERS,
        default=None,
        action=_Setting,
        help="Block manager of the KV cache. 'pie' serves more and longer requests than the "
        "device's KV memory holds, with KV blocks in CPU memory that are copied in a layer "
        "ahead. 'default' is vLLM's own.",
    )

    _add_off(group, "--block-manager", lambda _: "default")

    def add(key: str, parse: Callable[[object], Any], metavar: str, text: str) -> None:
        group.add_argument(
            FLAGS[key],
            type=_parsed(parse),
            default=None,
            metavar=metavar,
            action=_Setting,
            help=text,
        )
        _add_off(group, FLAGS[key], parse)

    add(
        "pool_gib",
        _or("auto", parse_pool_gib),
        "GIB",
        "CPU memory for pooled KV in all, in GiB, over all ranks of --tensor-parallel-size "
        "together, or 'auto' (the default): the smaller of "
        "four times the device's KV bytes and half of the free CPU memory.",
    )
    add(
        "target_slowdown",
        _or("off", parse_target_slowdown),
        "F",
        "How much longer steps may take because of pooled KV, as a share of their time (default "
        "0.01). It limits how much is pooled, and how often requests with pooled KV run. 'off' "
        "pools as much as fits, whatever it costs.",
    )
    add(
        "parking",
        _or("off", parse_parking),
        "{lru,off}",
        "What happens to cached KV whose block gets another use, with prefix caching: it is kept "
        "in CPU memory as far as the pool goes and copied back when a request asks for it, also "
        "after a preemption. 'lru' (the default) gives up first what was used least recently; "
        "'off' keeps nothing.",
    )
    add(
        "ring_slots",
        parse_ring_slots,
        "N",
        "Advanced: layers whose pooled blocks fit the device at once (default 3).",
    )
    add(
        "ring_fraction",
        _or("auto", parse_ring_fraction),
        "F",
        "Advanced: share of the device's KV bytes that the ring of pooled pages may take, or "
        "'auto' (the default): what the link can feed in a step, and at most 0.15. It limits how "
        "many blocks can be pooled at once.",
    )
    add(
        "link_gbps",
        _or("auto", parse_link_gbps),
        "GBPS",
        "Advanced: speed from the CPU to the device in GB/s, in place of what is measured at "
        "start ('auto', the default). No more is counted on, so a low value leaves the rest of "
        "the link to others.",
    )
    group.add_argument(
        FLAGS["full_graphs"],
        default=None,
        action=_Switch,
        help="Experimental, not yet proven on a GPU: steps that only decode keep their FULL CUDA "
        "graph when they load KV, with the copies inside the graph (default: such steps run "
        "piecewise).",
    )
    _add_off(group, FLAGS["full_graphs"], lambda _: False, "_")


def _configure(args: Any) -> None:
    """Set the classes that pie needs in the engine arguments, after checks."""
    from vllm.platforms import current_platform

    from pie_vllm.engine.native import load_library
    from pie_vllm.vllm import refusals, settings
    from pie_vllm.vllm.compat import engine_core, loggers, patching, weights
    from pie_vllm.vllm.plugin import engage

    patching.check_version()
    engine_core.check_engine_core()
    loggers.check_metrics()
    weights.check_weights()
    load_library()  # A missing or foreign build must show before the model loads.
    taken = settings.take(args.additional_config)
    worker = worker_class(device_of(current_platform))
    refusals.check_engine_args(args, SCHEDULER, worker)
    _check_pool(args, taken.config.pool_gib, current_platform)
    engage()
    args.scheduler_cls = SCHEDULER
    args.worker_cls = worker
    args.additional_config = {**args.additional_config, SETTINGS_KEY: taken}


def _check(config: Any) -> None:
    """Refuse what a finished configuration asks for beside pie, or has in place of it."""
    from vllm.platforms import current_platform

    from pie_vllm.vllm import cautions, refusals, settings

    device = device_of(current_platform)
    refusals.check_classes(config, SCHEDULER, worker_class(device))
    refusals.check_config(config, device)
    refusals.check_full_graphs(settings.of(config).config.full_graphs, device)
    cautions.caution(config)


def device_of(platform: Any) -> str:
    """Kind of a platform's device; vLLM calls ROCm's "cuda", and no device the empty text."""
    return "rocm" if platform.is_rocm() else platform.device_type or "none"


def worker_class(device_type: str) -> str:
    """Qualified name of the worker class for a platform.

    Raises:
        UnsupportedError: no driver for that platform.
    """
    if device_type in WORKERS:
        return WORKERS[device_type]
    raise UnsupportedError(
        f"--block-manager pie has no driver for device {device_type!r} in this version; it runs "
        f"on {', '.join(WORKERS)}. Use --block-manager default."
    )


def _check_pool(args: Any, size: float | None, platform: Any) -> None:
    """Refuse a pool of so many GiB that cannot fit, before the model loads."""
    from pie_vllm.engine.host_memory import check_pool_fits

    if size is not None:
        device = args.kv_cache_memory_bytes if platform.is_cpu() else 0
        check_pool_fits(int(size * 2**30), args.tensor_parallel_size * int(device or 0))


def install(module: ModuleType) -> None:
    """Wrap vLLM's argument handling; calling it again changes nothing.

    Relies on ``EngineArgs.add_cli_args`` being looked up by
    ``AsyncEngineArgs.add_cli_args`` after plugins were loaded
    (engine/arg_utils.py:3202), and on ``from_cli_args`` copying the namespace's
    ``additional_config`` (:1933). What a vLLM does not have is left alone: without
    pie it runs as it is, and pie says what it supports when it is asked for.
    """
    owner: Any = getattr(module, "EngineArgs", None)
    if owner is None or "_pie_installed" in vars(owner):
        return
    owner._pie_installed = True
    for name, wrap in (
        ("add_cli_args", _with_flags),
        ("from_cli_args", _with_merge),
        ("create_engine_config", _with_pie),
    ):
        found = vars(owner).get(name)
        if found is None:
            logger.debug("Pie: vLLM's EngineArgs has no %s", name)
            continue
        original = getattr(found, "__func__", found)
        wrapped = functools.wraps(original)(wrap(original))
        setattr(owner, name, wrapped if original is found else type(found)(wrapped))


def _with_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def add(parser: Any, *args: Any, **kwargs: Any) -> Any:
        result = add_cli_args(parser, *args, **kwargs)
        try:
            _add_flags(result)
        except Exception as error:  # Stock vLLM starts, whatever its parser has become.
            logger.warning("Pie: no flags of --block-manager pie with this vLLM: %s", error)
        return result

    return add


def _with_merge(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli(cls: Any, args: argparse.Namespace, *more: Any, **kwargs: Any) -> Any:
        try:
            _merge(args)
            wants_pie(getattr(args, "additional_config", None))
        except PieError as error:
            print(f"vllm: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return from_cli_args(cls, args, *more, **kwargs)

    return from_cli


def _with_pie(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(self, "additional_config", None)
        if wants_pie(given):
            _configure(self)
            config = create_engine_config(self, *args, **kwargs)
            _check(config)
            return config
        if isinstance(given, dict) and BLOCK_MANAGER_KEY in given:
            # vLLM hashes it for its compile cache, where the default must change nothing.
            self.additional_config = {k: v for k, v in given.items() if k != BLOCK_MANAGER_KEY}
        return create_engine_config(self, *args, **kwargs)

    return create

"""vLLM's engine arguments: how pie's classes and settings get into the configuration."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pie_vllm.config import BLOCK_MANAGER_KEY, SETTINGS_KEY, PieConfig
from pie_vllm.errors import PieError, UnsupportedError
from pie_vllm.vllm import flags
from pie_vllm.vllm.opt_in import wants_pie

logger = logging.getLogger("vllm.pie")

SCHEDULER = "pie_vllm.vllm.scheduler_side.scheduler.make_scheduler"
WORKERS = {
    "cpu": "pie_vllm.vllm.worker_side.cpu_worker.PieCPUWorker",
    "cuda": "pie_vllm.vllm.worker_side.gpu_worker.PieGPUWorker",
}
"""Worker class by kind of device; each is imported on its own platform only."""


def _configure(args: Any, engage: Callable[[], None]) -> None:
    """Check the engine arguments and set pie's classes in them."""
    from vllm.platforms import current_platform

    from pie_vllm.engine.native import load_library
    from pie_vllm.vllm import refusals, settings
    from pie_vllm.vllm.compat import engine_core, loggers, patching, weights

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
    """Refuse a finished configuration that pie cannot run, or that has lost pie's classes."""
    from vllm.platforms import current_platform

    from pie_vllm.vllm import cautions, draft_refusals, refusals, settings

    device = device_of(current_platform)
    refusals.check_classes(config, SCHEDULER, worker_class(device))
    refusals.check_config(config, device)
    draft_refusals.check_drafter(config)
    speculates = config.speculative_config is not None
    refusals.check_full_graphs(
        settings.of(config).config.full_graphs, device, speculates=speculates
    )
    cautions.caution(config)


def device_of(platform: Any) -> str:
    """Kind of a platform's device. vLLM calls ROCm's "cuda", and gives no name to no device."""
    return "rocm" if platform.is_rocm() else platform.device_type or "none"


def worker_class(device_type: str) -> str:
    """Qualified name of the worker class for a kind of device.

    Raises:
        UnsupportedError: pie has no driver for it.
    """
    if device_type in WORKERS:
        return WORKERS[device_type]
    raise UnsupportedError(
        f"--block-manager pie has no driver for device {device_type!r} in this version; it runs "
        f"on {', '.join(WORKERS)}. Use --block-manager default."
    )


def _check_pool(args: Any, size: float | None, platform: Any) -> None:
    """Refuse a pool of ``size`` GiB that CPU memory cannot hold, before the model loads."""
    from pie_vllm.engine.host_memory import check_pool_fits

    if size is not None:
        device = args.kv_cache_memory_bytes if platform.is_cpu() else 0
        check_pool_fits(int(size * 2**30), args.tensor_parallel_size * int(device or 0))


def install(module: ModuleType, engage: Callable[[], None]) -> None:
    """Wrap vLLM's argument handling; calling it again changes nothing.

    It relies on ``AsyncEngineArgs.add_cli_args`` looking up ``EngineArgs.add_cli_args`` after
    plugins were loaded (engine/arg_utils.py:3202), and on ``from_cli_args`` copying the
    namespace's ``additional_config`` (:1933). What a vLLM does not have is left alone: without
    pie it runs as it is, and asking for pie gets the error that says what pie supports.

    Args:
        module: vLLM's ``engine.arg_utils``.
        engage: puts all else of pie in place; called once pie is asked for.
    """
    owner: Any = getattr(module, "EngineArgs", None)
    if owner is None or "_pie_installed" in vars(owner):
        return
    owner._pie_installed = True
    for name, wrap in (
        ("add_cli_args", _with_flags),
        ("from_cli_args", _with_merge),
        ("create_engine_config", functools.partial(with_pie, engage)),
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
            flags.add_flags(result)
        except Exception as error:  # Stock vLLM starts, whatever its parser has become.
            logger.warning("Pie: no flags of --block-manager pie with this vLLM: %s", error)
        return result

    return add


def _with_merge(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli(cls: Any, args: argparse.Namespace, *more: Any, **kwargs: Any) -> Any:
        try:
            flags.merge(args)
            flags.replace_old_flags(args)
            given: Any = getattr(args, "additional_config", None)
            if wants_pie(given):
                PieConfig.from_mapping(given.get(SETTINGS_KEY))
        except PieError as error:
            print(f"vllm: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return from_cli_args(cls, args, *more, **kwargs)

    return from_cli


def with_pie(
    engage: Callable[[], None], create_engine_config: Callable[..., Any]
) -> Callable[..., Any]:
    """``create_engine_config`` with pie's classes where pie is asked for, checked afterwards."""

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(self, "additional_config", None)
        if wants_pie(given):
            _configure(self, engage)
            config = create_engine_config(self, *args, **kwargs)
            _check(config)
            return config
        if isinstance(given, dict) and BLOCK_MANAGER_KEY in given:
            # vLLM hashes it for its compile cache, where the default must change nothing.
            self.additional_config = {k: v for k, v in given.items() if k != BLOCK_MANAGER_KEY}
        return create_engine_config(self, *args, **kwargs)

    return create

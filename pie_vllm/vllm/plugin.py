"""Entry point of ``vllm.general_plugins``: called in every vLLM process.

Most of them never use pie: this module adds the flags and the check whether pie is asked for, and
imports nothing of vLLM for it. ``engage`` puts all else in place, once pie is asked for.
"""

from __future__ import annotations

import copyreg
import logging
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from pie_vllm.vllm.compat.loading import once_loaded

ENGINE_ARGS = "vllm.engine.arg_utils"
"""Module of vLLM in which the flags and the check are added."""


def _never_raises(function: Callable[..., None]) -> Callable[..., None]:
    """Guard a function so that its error is a warning, and vLLM runs without pie."""

    @wraps(function)
    def guarded(*args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            logging.getLogger("vllm.pie").warning(
                "Pie: --block-manager pie cannot be had (%s: %s); vLLM runs as without the plugin.",
                type(error).__name__,
                error,
            )

    return guarded


@_never_raises
def register() -> None:
    """Add ``--block-manager`` and the ``--pie-*`` flags to vLLM, once. Never raises."""
    once_loaded(ENGINE_ARGS, _install)


@_never_raises
def _install(module: ModuleType) -> None:
    from pie_vllm.vllm.args import install

    install(module, engage)


def engage() -> None:
    """Patch what an engine with pie needs of vLLM, once in this process.

    It is called where pie is configured, and where its settings arrive from another process.
    """
    from pie_vllm.vllm.compat import engine_core, loggers, weights
    from pie_vllm.vllm.scheduler_side import handshake, prometheus
    from pie_vllm.vllm.settings import PieSettings

    copyreg.pickle(PieSettings, _pickled)
    engine_core.after_kv_caches(handshake.give_geometry_to_scheduler, handshake.check_classes)
    weights.after_new_weights(handshake.forget_kv_of_old_weights)
    weights.after_new_adapter("add_lora", handshake.adapter_added)
    weights.after_new_adapter("remove_lora", handshake.adapter_removed)
    loggers.with_prometheus_logger(prometheus.extend)


def _pickled(settings: Any) -> tuple[Any, ...]:
    """Reduce checked settings to their attributes, and mark whoever unpickles them."""
    state = {"geometry": settings.geometry, "prior": settings.prior}
    return _arrived, (settings.config,), state


def _arrived(config: Any) -> Any:
    """Settings from another process, which make this one a part of an engine with pie."""
    from pie_vllm.vllm.settings import PieSettings

    engage()
    return PieSettings(config)

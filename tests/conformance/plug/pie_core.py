"""pytest plugin: vLLM's own core tests over pie's scheduler, block manager and block pool."""

from __future__ import annotations

import abc
import collections
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import driven
import pytest
import sizes
import vllm.v1.core.sched.diffusion_scheduler  # noqa: F401  A subclass of stock's, not of pie's.
from forcing import Forcing
from outcomes import NOTES
from shadow import Shadow
from vllm.v1.core.sched import async_scheduler, scheduler

from pie_vllm.config import PieConfig
from pie_vllm.errors import UnsupportedError
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.vllm import layer_refusals, refusals, settings
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool
from pie_vllm.vllm.scheduler_side.manager import PieBlockSpaceManager
from pie_vllm.vllm.scheduler_side.scheduler import PieAsyncScheduler, PieScheduler

UNMOCKED: dict[str, dict[str, Any]] = {
    "model_config": {
        "use_mla": False,
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "enable_sleep_mode": False,
    },
    "cache_config": {
        "cache_dtype": "auto",
        "kv_offloading_size": None,
        "num_gpu_blocks_override": None,
        "kv_sharing_fast_prefill": False,
    },
}
"""Fields of a mocked configuration, which says yes to all."""

_built: list[tuple[str, str]] = []
_live: list[Any] = []
_substitutes: dict[type, type] = {}


def _refused_groups(config: Any) -> str | None:
    try:
        layer_refusals.check_groups(config.kv_cache_groups)
    except UnsupportedError as error:
        return str(error)
    except TypeError as error:  # States whose shapes are numbers, in tests of hits within blocks.
        return f"pages without a size: {error}"
    return None


def _refused_config(config: Any) -> str | None:
    for part, plains in UNMOCKED.items():
        for name, plain in plains.items():
            if isinstance(getattr(getattr(config, part), name), Mock):
                setattr(getattr(config, part), name, plain)
    try:
        refusals.check_config(config, "cpu")
    except UnsupportedError as error:
        return str(error)
    return None


def _make_scheduler(pie: type, stock: type, args: Any, kwargs: Any) -> Any:
    given = driven.by_name(stock, args, kwargs)
    config, kv = given["vllm_config"], given["kv_cache_config"]
    why = _refused_groups(kv) or _refused_config(config)
    if why:
        _built.append(("scheduler", "refused: " + why))
        return stock(*args, **kwargs)
    ours = settings.PieSettings(PieConfig(target_slowdown=None, parking=sizes.PARKING))
    ours.geometry = sizes.geometry(kv.num_blocks)
    config.additional_config = {"block_manager": "pie", "pie": ours}
    config.cache_config.num_gpu_blocks = ours.geometry.num_blocks
    made = pie(**{**given, "kv_cache_config": sizes.resized(kv)})
    _built.append(("scheduler", "pie"))
    _live.append(made.kv_cache_manager)
    _watch(made)
    return made


def _watch(made: Any) -> None:
    """After every step: books, plan, and the block tables that a worker would hold."""
    schedule, update = made.schedule, made.update_from_output
    manager = made.kv_cache_manager
    shadow = Shadow(manager.residency, manager.groups.pooled)
    forcing = Forcing(manager) if sizes.FORCED else None

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        if forcing is not None:
            forcing.demote_all()
        out = schedule(*args, **kwargs)
        manager.residency.check_integrity()
        shadow.check(out, made)
        return out

    def updated(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        manager.residency.check_integrity()
        return result

    made.schedule, made.update_from_output = scheduled, updated
    if sizes.LIFT:
        manager.admission.room.prompt_reserve = 0


def _make_manager(args: Any, kwargs: Any) -> Any:
    given = driven.by_name(driven.StockManager, args, kwargs)
    why = _refused_groups(given["kv_cache_config"])
    if given.get("enable_kv_cache_events"):
        why = why or "KV events"
    if given.get("use_eagle"):
        why = why or "speculative decoding"
    if why:
        _built.append(("manager", "refused: " + why))
        return driven.StockManager(*args, **kwargs)
    _built.append(("manager", "pie"))
    _live.append(driven.make_manager(given))
    return _live[-1]


def _make_pool(args: Any, kwargs: Any) -> Any:
    given = driven.by_name(driven.StockPool, args, kwargs)
    if given.get("enable_kv_cache_events"):
        _built.append(("pool", "refused: KV events"))
        return driven.StockPool(*args, **kwargs)
    _built.append(("pool", "pie"))
    return driven.make_pool(given)


class _AsStock(abc.ABCMeta):
    """Classes for which instances of stock's count as their own."""

    stock: type

    def __instancecheck__(cls, obj: Any) -> bool:
        return isinstance(obj, cls.stock)

    def __subclasscheck__(cls, sub: Any) -> bool:
        return issubclass(sub, cls.stock)


def _substitute(stock: type, pie: type, make: Callable[[Any, Any], Any]) -> None:
    """In place of a class: makes pie's objects, stock's where pie refuses; bare ones are pie's."""
    names = {"stock": stock, "__new__": lambda _cls, *args, **kwargs: make(args, kwargs)}
    _substitutes[stock] = _AsStock(stock.__name__, (pie,), names)


def pytest_configure() -> None:
    """Make the substitutes of the mode."""
    if sizes.MODE == "stock":
        return
    for end in ("fake_free_list_head", "fake_free_list_tail"):  # Tests walk vLLM's own list.
        read = property(lambda queue, end=end: getattr(queue._resident, end))
        setattr(TieredFreeBlockQueue, end, read)
    for stock, pie in (
        (scheduler.Scheduler, PieScheduler),
        (async_scheduler.AsyncScheduler, PieAsyncScheduler),
    ):
        make = lambda args, kwargs, pie=pie, stock=stock: _make_scheduler(pie, stock, args, kwargs)  # noqa: E731
        _substitute(stock, pie, make)
    if not sizes.FORCED:  # Managers and pools alone have no steps in which to demote.
        _substitute(driven.StockManager, PieBlockSpaceManager, _make_manager)
        _substitute(driven.StockPool, PieBlockPool, _make_pool)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the substitutes where the tests' modules and parameters name stock's classes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tests.") and module is not None:
            _replace(vars(module))
    for item in items:
        spec = getattr(item, "callspec", None)
        if spec:
            _replace(spec.params)


def _replace(names: dict[str, Any]) -> None:
    for key, value in list(names.items()):
        if isinstance(value, type) and value in _substitutes:
            names[key] = _substitutes[value]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note what was built and done in a test."""
    _built.clear()
    _live.clear()
    yield
    all_of = [manager.residency for manager in _live]
    NOTES[item.nodeid] = {
        "built": dict(collections.Counter(f"{what}:{how}" for what, how in _built)),
        "leaks": [leak for residency in all_of if (leak := _leak(residency))],
        "demotions": sum(residency.demotions for residency in all_of),
        "promotions": sum(residency.promotions for residency in all_of),
        "restored": sum(residency.parking.restored_blocks for residency in all_of),
    }
    _live.clear()


def _leak(residency: Any) -> list[int]:
    """What is not free though no request has a block."""
    if any(residency.tables.values()):
        return []
    free, total = residency.queue.free_in_all, residency.geometry.num_blocks
    holders, readers = len(residency.victims.holders), len(residency.read_set.by_request)
    return [free, total, holders, readers] if free != total - 1 or holders or readers else []

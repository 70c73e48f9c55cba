"""vLLM plugin: every engine that a test makes gets pie's block manager, by its public settings.

PIE_E2E: stock (a fixed, ample KV), idle (ample KV), pool (few resident blocks, many pooled).
PIE_E2E_LOG: file that each scheduler adds its counters to, a JSON line each time.
PIE_E2E_BLOCK: tokens of a block. PIE_E2E_FORK: engines fork; the CPU platform asks for spawn.
"""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import replace
from typing import Any

MODE = os.environ.get("PIE_E2E", "stock")
LOG = os.environ.get("PIE_E2E_LOG")
BLOCK = int(os.environ.get("PIE_E2E_BLOCK", "32"))
RESIDENTS = 12
AMPLE = 256 << 20
"""Bytes of KV where a test names none."""

NOTE_SECONDS = 0.5


def register() -> None:
    """Wrap ``EngineArgs.create_engine_config``; twice is once."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_pie_conformance", False):
        return
    EngineArgs._pie_conformance = True
    if MODE != "stock":
        from pie_vllm.vllm.plugin import register as register_pie

        register_pie()
        _watch_schedulers()
    create = EngineArgs.create_engine_config

    def created(given: Any, *args: Any, **kwargs: Any) -> Any:
        mine = copy.copy(given)  # Some tests make several engines from one EngineArgs.
        try:
            return _configured(create, mine, *args, **kwargs)
        finally:
            if os.environ.get("PIE_E2E_FORK"):
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    EngineArgs.create_engine_config = created


def _configured(create: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
    args.attention_backend = None  # Tests name GPU backends.
    args.enforce_eager = True  # Compilation takes minutes here.
    args.dtype = "float32"  # The same in any batch.
    args.block_size = BLOCK
    plain = args.scheduler_cls is None and args.worker_cls == "auto"
    if MODE == "stock" or not plain or (args.additional_config or {}).get("block_manager"):
        return _ample(create(args, *rest, **kwargs))
    from pie_vllm.errors import PieError

    before = copy.copy(args)
    if MODE == "pool":
        args.num_gpu_blocks_override = None  # Few residents come anyhow.
    ours = {"block_manager": "pie", "pie": {"target_slowdown": "off"}}
    args.additional_config = {**(args.additional_config or {}), **ours}
    try:
        config = create(args, *rest, **kwargs)
    except PieError as error:
        _note(event="refused", why=str(error)[:160])
        args.__dict__.update(before.__dict__)
        return _ample(create(args, *rest, **kwargs))
    if MODE == "idle" or args.kv_cache_memory_bytes:
        extra: dict[str, Any] = {"pool_gib": 0.0625}
        _ample(config)
    else:
        config.cache_config.kv_cache_memory_bytes, extra = _small(config)
    given = config.additional_config["pie"]
    given.config = replace(given.config, **extra)
    return config


def _ample(config: Any) -> Any:
    if not config.cache_config.kv_cache_memory_bytes:
        config.cache_config.kv_cache_memory_bytes = AMPLE
    return config


def _small(config: Any) -> tuple[int, dict[str, Any]]:
    """Device KV bytes for about RESIDENTS resident blocks, and a ring for the longest request."""
    model, parallel, slots = config.model_config, config.parallel_config, 2
    block = config.cache_config.block_size
    element = 4 if str(model.dtype) == "torch.float32" else 2
    page = block * model.get_num_kv_heads(parallel) * model.get_head_size() * 2 * element
    layers = model.get_num_layers(parallel)
    window = max(-(-model.max_model_len // block) + 2 - RESIDENTS, 24)

    def whole(size: int) -> int:
        return -(-size // 4096) * 4096

    device = layers * whole(RESIDENTS * page) + slots * whole(window * page)
    share = min((slots * whole(window * page) + 1) / device, 0.999)
    pool = (2 * window + 8) * page * layers / 2**30
    return device, {"pool_gib": pool, "ring_slots": slots, "ring_fraction": share}


def _watch_schedulers() -> None:
    from pie_vllm.vllm.scheduler_side import scheduler as module

    make = module.make_scheduler

    def made(vllm_config: Any, **kwargs: Any) -> Any:
        scheduler = make(vllm_config, **kwargs)
        Watch(scheduler)
        return scheduler

    module.make_scheduler = made


class Watch:
    """Checks a scheduler's books after every step, and notes its counters.

    In mode ``pool`` every block that can be demoted is, before each step, and none is promoted.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._residency = residency = scheduler.kv_cache_manager.residency
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        self._preempt, self._end_step = scheduler._preempt_request, residency.end_step
        self._steps = self._preempted = self._peak = 0
        self._noted, self._last = 0.0, {}
        scheduler.schedule, scheduler.update_from_output = self.schedule, self.update
        scheduler._preempt_request = self.preempt
        if MODE == "pool":
            residency.end_step = self.end_step
        sizes = residency.geometry
        _note(
            event="engine",
            residents=sizes.resident_blocks,
            pooled=sizes.pooled_blocks,
            rows=sizes.rows,
            prefix_caching=scheduler.kv_cache_manager.enable_caching,
        )

    def preempt(self, *args: Any, **kwargs: Any) -> Any:
        self._preempted += 1
        return self._preempt(*args, **kwargs)

    def end_step(self, scheduled: Any, fresh: Any, forward: Any, _headroom: Any, *rest: Any) -> Any:
        return self._end_step(scheduled, fresh, forward, None, *rest)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        residency = self._residency
        if MODE == "pool":
            self._scheduler.kv_cache_manager.residency.catch_up()
            if count := min(residency.queue.demotable, residency.queue.available_pooled):
                residency.make_residents_free(count)
        output = self._schedule(*args, **kwargs)
        self._peak = max(self._peak, residency.pooled_in_use)
        residency.check_integrity()
        return output

    def update(self, *args: Any, **kwargs: Any) -> Any:
        result = self._update(*args, **kwargs)
        self._steps += 1
        residency = self._residency
        residency.check_integrity()
        now = {
            "demotions": residency.demotions,
            "promotions": residency.promotions,
            "restored": residency.parking.restored_blocks,
            "preempted": self._preempted,
            "peak": self._peak,
        }
        due = time.monotonic() - self._noted > NOTE_SECONDS
        if now != self._last and (due or not self._scheduler.has_unfinished_requests()):
            self._last, self._noted = now, time.monotonic()
            loaded = self._scheduler.pie_log.totals.bytes_loaded
            _note(
                event="counters", key=id(self._scheduler), steps=self._steps, loaded=loaded, **now
            )
        return result


def _note(**what: Any) -> None:
    if LOG:
        what.update(pid=os.getpid(), test=os.environ.get("PYTEST_CURRENT_TEST", "?"))
        with open(LOG, "a") as file:
            file.write(json.dumps(what) + "\n")

"""Everything that depends on a version of vLLM, and the patches of it.

Read in vLLM 0.32.0 and 0.33.0. Each entry says which line it relies on; the
line is checked when the patch is made, and a patch that no longer fits fails
with a clear error instead of a wrong answer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any

import torch
import vllm
from packaging.version import Version

from pie_vllm.errors import UnsupportedError

SUPPORTED = (Version("0.32"), Version("0.34"))


def check_version(found: str | None = None) -> None:
    """Raise UnsupportedError unless the vLLM found is a supported one."""
    text = vllm.__version__ if found is None else found
    low, high = SUPPORTED
    if not low <= Version(Version(text).base_version) < high:
        raise UnsupportedError(
            f"--block-manager pie supports vLLM >={low},<{high}, found {text}. Install a "
            f"supported version (pip install 'vllm>={low},<{high}') or use "
            "--block-manager default."
        )


def expect(obj: Any, *fragments: str) -> None:
    """Raise UnsupportedError unless the source of ``obj`` has each fragment."""
    source = inspect.getsource(obj)
    for fragment in fragments:
        if fragment not in source:
            name = getattr(obj, "__qualname__", getattr(obj, "__name__", repr(obj)))
            raise UnsupportedError(
                f"vLLM {vllm.__version__}: {name} has no '{fragment}', which pie_vllm relies "
                "on. Use a supported vLLM version or --block-manager default."
            )


def expect_in_order(obj: Any, *fragments: str) -> None:
    """As ``expect``, where each fragment comes after the one before; others may stand between."""
    source, end = inspect.getsource(obj), 0
    for fragment in fragments:
        begin = source.find(fragment, end)
        if begin < 0:
            name = getattr(obj, "__qualname__", repr(obj))
            raise UnsupportedError(
                f"vLLM {vllm.__version__}: {name} has no '{fragment}' after what pie_vllm expects "
                "before it. Use a supported vLLM version or --block-manager default."
            )
        end = begin + len(fragment)


_classes: dict[tuple[type, str], type] = {}


def call_before(target: Any, name: str, then: Callable[..., None]) -> None:
    """Have ``then`` called with the arguments of a method of one object, before each call of it.

    The object's class becomes a subclass, as for ``gate.install``: whoever looks the method up
    finds it, and calls of the base class are not touched.
    """
    base = type(target)
    key = (base, name)
    if key not in _classes:
        original = getattr(base, name)
        noted = f"_pie_before_{name}"

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            getattr(self, noted)(*args, **kwargs)
            return original(self, *args, **kwargs)

        _classes[key] = type("Pie" + base.__name__, (base,), {name: method})
    target.__class__ = _classes[key]
    setattr(target, f"_pie_before_{name}", then)


@contextmanager
def swapped(module: Any, name: str, value: Any, caller: Any, line: str) -> Iterator[None]:
    """Replace a module's global while a vLLM function that uses it runs.

    Args:
        module: the module whose global is replaced.
        name: the global.
        value: what it is meanwhile.
        caller: the vLLM function that looks the global up.
        line: what must stand in that function's source.
    """
    expect(caller, line)
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def wrapped_once(
    owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Put ``wrap(method)`` in place of a method for good; a second call changes nothing."""
    original = getattr(owner, name)
    if not getattr(original, "pie", False):
        wrapped: Any = wrap(original)
        wrapped.pie = True
        setattr(owner, name, wrapped)


def own_block_pool(pool_class: type) -> Any:
    """Make vLLM's coordinator build ``pool_class``, its one block pool.

    Relies on ``self.block_pool = BlockPool(``, v1/core/kv_cache_coordinator.py:119, and that a
    list of free blocks can be walked, v1/core/kv_cache_utils.py:495.
    """
    from vllm.v1.core import kv_cache_coordinator as module
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    expect(FreeKVCacheBlockQueue, "def iter_blocks_after(")
    caller = module.KVCacheCoordinator.__init__
    return swapped(module, "BlockPool", pool_class, caller, "self.block_pool = BlockPool(")


def own_block_manager(factory: Callable[..., Any]) -> Any:
    """Make vLLM's scheduler build its KV cache manager by ``factory``.

    Relies on ``self.kv_cache_manager = KVCacheManager(``, v1/core/sched/scheduler.py:328, and on
    the calls of methods that pie's scheduler overrides: for each waiting request that is looked
    at, 929 there, and when a streaming session goes on, 2626 there.
    """
    from vllm.v1.core.sched import scheduler as module

    expect(module.Scheduler.schedule, "= self._handle_blocked_waiting_request(request)")
    expect(module.Scheduler.add_request, "self._update_request_as_session(existing, update)")
    caller = module.Scheduler.__init__
    line = "self.kv_cache_manager = KVCacheManager("
    return swapped(module, "KVCacheManager", factory, caller, line)


def is_v2(runner: Any) -> bool:
    """Whether a model runner is vLLM's V2 one; its request slots are ``req_states``.

    Relies on v1/worker/gpu/model_runner.py:323; the V1 runner has ``input_batch`` in its place.
    """
    return hasattr(runner, "req_states")


def own_allocation(runner: Any, allocate: Callable[..., Any]) -> AbstractContextManager[None]:
    """Make a model runner get its KV tensors from ``allocate``.

    Relies on ``kv_caches = allocate_kv_cache(``, v1/worker/gpu_model_runner.py:7000.
    """
    if is_v2(runner):
        from pie_vllm.vllm import compat_v2

        return compat_v2.own_allocation(allocate)
    from vllm.v1.worker import gpu_model_runner as module

    caller = module.GPUModelRunner.initialize_kv_cache_tensors
    line = "kv_caches = allocate_kv_cache("
    return swapped(module, "allocate_kv_cache", allocate, caller, line)


def before_inputs(runner: Any, then: Callable[[Any], None]) -> None:
    """Call ``then(scheduler_output)`` when a model runner updates its states for a step.

    The runner becomes one of a subclass once it is made: ``Worker._make_model_runner`` exists on
    CUDA alone, vLLM's CPU worker makes its runner in ``init_device`` (v1/worker/cpu_worker.py:168).
    Relies on ``_update_states(scheduler_output)`` at the start of ``execute_model``,
    v1/worker/gpu_model_runner.py:3979, inside the region that is ordered with the
    previous step's input copies.
    """
    if is_v2(runner):
        from pie_vllm.vllm import compat_v2

        compat_v2.before_inputs(runner, then)
        return
    expect(type(runner).execute_model, "self._update_states(scheduler_output)")
    call_before(runner, "_update_states", then)


def after_kv_caches(
    then: Callable[[Any, Any], None], first: Callable[[Any], None] | None = None
) -> None:
    """Call ``then(engine_core, vllm_config)`` once the workers have their KV caches.

    And ``first(vllm_config)`` before they get them.

    The scheduler needs the sizes that the workers chose; vLLM hands it the
    number of blocks only. Relies on ``kv_cache_config = self._initialize_kv_caches(
    vllm_config)`` before the scheduler is made, v1/engine/core.py:156.
    """
    from vllm.v1.engine.core import EngineCore

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def initialize(self: Any, vllm_config: Any) -> Any:
            if first is not None:
                first(vllm_config)
            result = original(self, vllm_config)
            then(self, vllm_config)
            return result

        return initialize

    wrapped_once(EngineCore, "_initialize_kv_caches", wrap)


def carry(stats: Any) -> dict[str, int]:
    """The part of vLLM's scheduler statistics that takes pie's numbers to the front end.

    ``SchedulerStats`` is encoded field by field; ``num_kv_fetch_reqs_by_stage: dict[str, int]``
    takes any key, v1/metrics/stats.py:232. The front end must take them out again, or vLLM's own
    log line counts them as fetches, v1/metrics/loggers.py:303.
    """
    carried: dict[str, int] = stats.num_kv_fetch_reqs_by_stage
    return carried


def with_prometheus_logger(extend: Callable[[Any, Any], None]) -> None:
    """Call ``extend(logger, vllm_config)`` for each PrometheusStatLogger once it is made.

    Not a stat-logger plug-in: those replace vLLM's own for all users and are not loaded by
    ``LLM``. Relies on ``PrometheusStatLogger(vllm_config, self.engine_indexes)``,
    v1/metrics/loggers.py:1418.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            extend(self, vllm_config)

        return init

    wrapped_once(PrometheusStatLogger, "__init__", wrap)


def check_metrics() -> None:
    """Check the lines that ``carry`` and ``with_prometheus_logger`` rely on."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    expect(SchedulerStats, "num_kv_fetch_reqs_by_stage: dict[str, int]")
    expect(StatLoggerManager.__init__, "PrometheusStatLogger(vllm_config, self.engine_indexes)")
    expect(PrometheusStatLogger.record, "num_kv_fetch_reqs_by_stage.get(stage, 0)")


def check_engine_core() -> None:
    """Check the line that ``after_kv_caches`` relies on."""
    from vllm.v1.engine.core import EngineCore

    expect(EngineCore.__init__, "kv_cache_config = self._initialize_kv_caches(vllm_config)")


def relabel_rows(runner: Any, relabels: Any) -> None:
    """Write new block ids into a runner's block tables.

    The V1 runner has them in its request states and its input batch: relies on
    ``CachedRequestState.block_ids`` and ``BlockTable.block_table.np``,
    v1/worker/gpu_model_runner.py:1426 and v1/worker/block_table.py:102. A
    request that left the persistent batch keeps its ids in its state only.
    """
    if is_v2(runner):
        from pie_vllm.vllm import compat_v2

        compat_v2.relabel_rows(runner, relabels)
        return
    batch = runner.input_batch
    for request_id, first, blocks in relabels:
        state = runner.requests.get(request_id)
        if state is None:
            raise UnsupportedError(
                f"request {request_id} is not known to the model runner, though its blocks moved"
            )
        end = first + len(blocks)
        state.block_ids[0][first:end] = blocks
        row = batch.req_id_to_index.get(request_id)
        if row is not None:
            batch.block_table.block_tables[0].block_table.np[row, first:end] = blocks


def forward_seconds(runner: Any, tokens: int) -> float:
    """Seconds of a forward pass over so many tokens, without attention.

    Of requests that decode, as many as there are tokens, up to ``--max-num-seqs``. The least of
    three passes, of which the first warms up, before there is a KV cache.
    """
    if is_v2(runner):
        from pie_vllm.vllm import compat_v2

        one_pass = compat_v2.forward_pass(runner)
    else:
        one_pass = _forward_pass(runner)
    return min(one_pass(tokens) for _ in range(3))


def _forward_pass(runner: Any) -> Callable[[int], float]:
    """One pass of the V1 runner.

    Relies on ``_dummy_run`` as ``profile_run`` calls it, v1/worker/gpu_model_runner.py:6193, and on
    ``compute_logits`` of what it returns, 5942 there.
    """
    expect(
        type(runner).profile_run,
        "hidden_states, last_hidden_states = self._dummy_run(",
        "self._sync_device()",
    )
    expect(type(runner)._dummy_sampler_run, "self.model.compute_logits(hidden_states)")

    def seconds(tokens: int) -> float:
        start = perf_counter()
        _, last_hidden_states = runner._dummy_run(tokens, is_profile=True)
        with torch.inference_mode():
            runner.model.compute_logits(last_hidden_states)
        runner._sync_device()
        return perf_counter() - start

    return seconds

"""Pie's metrics among those of vLLM: ``/metrics`` of a server, ``LLM.get_metrics()``."""

from __future__ import annotations

from typing import Any

from pie_vllm.policy.admission.waits import REASONS
from pie_vllm.vllm import settings
from pie_vllm.vllm.compat import loggers
from pie_vllm.vllm.scheduler_side.metrics import HEAD_WAITS, MICROSECONDS

GAUGES = {
    "pie_resident_blocks": "KV blocks in device memory, vLLM's null block included.",
    "pie_resident_blocks_used": "Resident blocks in use by requests.",
    "pie_pooled_blocks": "Maximum number of KV blocks pooled in CPU memory at once.",
    "pie_pooled_blocks_used": "Pooled blocks in use by requests.",
    "pie_pooled_blocks_read": "Pooled blocks that the last step read through the ring.",
    "pie_admission_limit_blocks": "Pooled blocks in use above which no waiting request is "
    "admitted.",
    "pie_step_budget_blocks": "Maximum number of pooled blocks that the last step could read.",
    "pie_link_bytes_per_second": "Measured bandwidth from CPU memory to the device, in bytes per "
    "second; 0 while unknown.",
    "pie_capacity_gained_blocks": "Blocks of both tiers beyond the number that the same device "
    "memory holds without pie.",
    "pie_ring_bytes": "Device memory of the ring, in bytes.",
    "pie_parked_blocks": "Full blocks kept in CPU memory that no running request uses; a prefix "
    "hit, or a preempted request that goes on, copies them back.",
    "pie_pool_bytes": "CPU memory held by the pool, in bytes.",
    "pie_pool_ceiling_bytes": "Maximum CPU memory of the pool, in bytes.",
}
"""Help text of each gauge, by its name without the prefix ``vllm:``."""

COUNTERS = {
    "pie_streaming_steps": "Engine steps that copied KV.",
    "pie_graph_steps": "Engine steps that copied KV inside a FULL CUDA graph.",
    "pie_loaded_bytes": "KV copied from CPU memory to the device, in bytes.",
    "pie_stored_bytes": "KV copied from the device to CPU memory, in bytes.",
    "pie_load_seconds": "Time during which the link was busy loading, in seconds.",
    "pie_store_seconds": "Time during which the link was busy storing, in seconds.",
    "pie_stall_seconds": "Time during which the compute waited for KV, in seconds.",
    "pie_streaming_seconds": "Duration of all engine steps that loaded KV, in seconds.",
    "pie_slowed_seconds": "Estimated time by which copies slowed the compute beside them, in "
    "seconds.",
    "pie_demoted_blocks": "Blocks moved from device memory to the pool.",
    "pie_promoted_blocks": "Blocks moved from the pool back to device memory.",
    "pie_left_out_requests": "Running requests left out of a step because the link could not "
    "feed them; a request counts once for each such step.",
    "pie_recomputed_tokens": "Tokens that preempted requests computed again.",
    "pie_parked_stores": "Blocks stored to CPU memory so that they outlive the reuse of their "
    "page.",
    "pie_parked_ahead": "Part of pie_parked_stores: blocks stored before their page was needed.",
    "pie_parked_losses": "Blocks, cached or of preempted requests, whose KV was dropped when their "
    "page was reused.",
    "pie_restored_blocks": "Blocks copied back to device memory for requests that asked for them.",
    "pie_resident_hits": "Blocks found in the prefix cache, or again by preempted requests, in "
    "device memory.",
    "pie_pooled_hits": "Blocks found in the prefix cache, or again by preempted requests, that "
    "were pooled.",
    "pie_parked_hits": "Blocks found in the prefix cache, or again by preempted requests, that "
    "were parked in CPU memory.",
    "pie_failed_copies": "Engine steps in which a copy of KV failed; the requests concerned "
    "computed it again.",
}
"""Help text of each counter, by its name without ``vllm:`` and ``_total``.

Counters travel as increments, those of seconds in whole microseconds.
"""

BY_REASON = {
    HEAD_WAITS: "Engine steps in which the first waiting request was passed over, by reason. "
    + "; ".join(f"{reason}: {text}" for reason, text in REASONS.items())
    + ".",
}
"""Help text of each counter that has the further label ``reason``; named as in COUNTERS."""


class PieMetrics:
    """Pie's gauges and counters beside those of one PrometheusStatLogger."""

    def __init__(self, logger: Any) -> None:
        """Register all metrics with the metric classes and the labels of ``logger``."""
        labels = ["model_name", "engine"]
        values = logger.per_engine_labelvalues
        self._gauges = {}
        for name, text in GAUGES.items():
            gauge = logger._gauge_cls(
                name=f"vllm:{name}",
                documentation=text,
                multiprocess_mode="mostrecent",
                labelnames=labels,
            )
            self._gauges[name] = {i: gauge.labels(*found) for i, found in values.items()}
        self._counters = {}
        for name, text in COUNTERS.items():
            counter = logger._counter_cls(
                name=f"vllm:{name}", documentation=text, labelnames=labels
            )
            self._counters[name] = {i: counter.labels(*found) for i, found in values.items()}
        for name, text in BY_REASON.items():
            counter = logger._counter_cls(
                name=f"vllm:{name}", documentation=text, labelnames=[*labels, "reason"]
            )
            for reason in REASONS:
                self._counters[f"{name}:{reason}"] = {
                    i: counter.labels(*found, reason) for i, found in values.items()
                }

    def record(self, carried: dict[str, int], engine: int) -> None:
        """Move pie's numbers out of ``carried`` into the metrics of one engine.

        Args:
            carried: what the scheduler sent; loses its entries that begin with ``pie_``.
            engine: index of the engine.
        """
        for name in [name for name in carried if name.startswith("pie_")]:
            value = carried.pop(name)
            if name in self._gauges:
                self._gauges[name][engine].set(value)
            elif name in self._counters:
                unit = MICROSECONDS if name.endswith("_seconds") else 1
                self._counters[name][engine].inc(value / unit)


def extend(logger: Any, vllm_config: Any) -> None:
    """Give a PrometheusStatLogger pie's metrics, where the engine uses pie."""
    if not settings.wants_pie(vllm_config.additional_config):
        return
    metrics = PieMetrics(logger)
    record = logger.record

    def record_all(
        scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            metrics.record(loggers.carry(scheduler_stats), engine_idx)
        record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    logger.record = record_all

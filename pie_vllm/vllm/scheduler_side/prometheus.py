"""Pie's metrics among those of vLLM: ``/metrics`` of a server, ``LLM.get_metrics()``."""

from __future__ import annotations

from typing import Any

from pie_vllm.policy.admission.waits import REASONS
from pie_vllm.vllm import settings
from pie_vllm.vllm.compat import loggers
from pie_vllm.vllm.scheduler_side.metrics import HEAD_WAITS, MICROSECONDS

GAUGES = {
    "pie_resident_blocks": "KV cache blocks in device memory, the null block included.",
    "pie_resident_blocks_used": "Resident blocks that requests use.",
    "pie_pooled_blocks": "KV cache blocks that can be pooled in CPU memory at once.",
    "pie_pooled_blocks_used": "Pooled blocks that requests use.",
    "pie_pooled_blocks_read": "Pooled blocks that the last step read through the ring.",
    "pie_admission_limit_blocks": "Pooled blocks in use beyond which no request is admitted.",
    "pie_step_budget_blocks": "Pooled blocks that the last step was allowed to read.",
    "pie_link_bytes_per_second": "Speed of the link to the device as measured; 0 while unknown.",
    "pie_capacity_gained_blocks": "Blocks of both tiers beyond those that the device's memory "
    "would hold without pie.",
    "pie_ring_bytes": "Device memory of the ring, in bytes.",
    "pie_parked_blocks": "Full blocks in CPU memory that no request uses, to be copied back when "
    "one asks for them.",
    "pie_pool_bytes": "CPU memory that the pool holds now, in bytes.",
    "pie_pool_ceiling_bytes": "CPU memory that the pool may hold, in bytes.",
}
"""Name as it travels, without ``vllm:``: documentation."""

COUNTERS = {
    "pie_streaming_steps": "Engine steps that moved KV.",
    "pie_graph_steps": "Engine steps that moved KV and ran in a FULL CUDA graph.",
    "pie_loaded_bytes": "KV copied from the CPU pool, in bytes.",
    "pie_stored_bytes": "KV copied to the CPU pool, in bytes.",
    "pie_load_seconds": "Time the link was busy loading, in seconds.",
    "pie_store_seconds": "Time the link was busy storing, in seconds.",
    "pie_stall_seconds": "Time the compute waited for KV, in seconds.",
    "pie_streaming_seconds": "Time of engine steps that loaded KV, in seconds.",
    "pie_slowed_seconds": "Time by which copies slowed the compute beside them, as estimated, in "
    "seconds.",
    "pie_demoted_blocks": "Blocks moved from the device to the pool.",
    "pie_promoted_blocks": "Blocks moved back to the device for good.",
    "pie_left_out_requests": "Running requests left out of a step because the link could not "
    "feed them.",
    "pie_recomputed_tokens": "Tokens that preempted requests computed again.",
    "pie_parked_stores": "Blocks stored to CPU memory to be found there once their place has "
    "another use.",
    "pie_parked_ahead": "Of the blocks stored so, those stored before their place was wanted.",
    "pie_parked_losses": "Cached blocks whose KV was not kept when their place got another use.",
    "pie_restored_blocks": "Blocks copied back to the device for requests that asked for them.",
    "pie_resident_hits": "Blocks found in the prefix cache in device memory.",
    "pie_pooled_hits": "Blocks found in the prefix cache that were pooled.",
    "pie_parked_hits": "Blocks found in the prefix cache that were parked in CPU memory.",
    "pie_failed_copies": "Engine steps in which a copy of KV failed; the requests concerned were "
    "computed again.",
}
"""As GAUGES. Increments travel; those of seconds as whole microseconds."""

BY_REASON = {
    HEAD_WAITS: "Engine steps in which the first waiting request was passed over, by what kept it: "
    + "; ".join(f"{reason}: {text}" for reason, text in REASONS.items())
    + ".",
}
"""As COUNTERS, with a label ``reason``."""


class PieMetrics:
    """The gauges and counters of one PrometheusStatLogger."""

    def __init__(self, logger: Any) -> None:
        """Register them beside those of ``logger``, with its classes and labels."""
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
        """Take pie's numbers out of ``carried``, and note them for an engine."""
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

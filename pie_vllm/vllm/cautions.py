"""Cautions: settings that pie runs with at a cost, each named in a warning at start."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.pie")


def caution(config: Any) -> None:
    """Log a warning for each such setting of a finished VllmConfig."""
    for text in cautions(config):
        logger.warning("%s", text)


def cautions(config: Any) -> list[str]:
    """The warnings: each names the setting, its effect and the way out."""
    offload, found = config.offload_config, []
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        found.append(
            "Pie: weights are offloaded to the CPU (--cpu-offload-gb, --offload-group-size), so "
            "each step loads them over the link that pooled KV comes over. The link was measured "
            "without them: less KV is hidden behind the compute than the measurement says, until "
            "the slowdown that steps show has lowered the budget. The CPU memory that they take "
            "is not the pool's. Offload fewer weights, or set "
            'additional_config["pie"]["link_gbps"] to what they leave.'
        )
    if config.observability_config.kv_cache_metrics:
        found.append(
            "Pie: --kv-cache-metrics counts block ids. A block that is demoted or promoted gets "
            "another id, so its lifetime and idle time begin anew. Pie's own metrics (vllm:pie_*) "
            "count KV."
        )
    return found

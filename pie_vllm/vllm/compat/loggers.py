"""vLLM's statistics, which carry pie's numbers to the front end.

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pie_vllm.vllm.compat.patching import expect, wrapped_once


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

"""Counters of the transfer engine and of both tiers: log line, front end, Python users."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm.logger import init_logger

from pie_vllm.geometry import Geometry
from pie_vllm.plan import Totals
from pie_vllm.policy.admission.waits import HeadWaits
from pie_vllm.policy.control.detector import Detector
from pie_vllm.policy.placement.residency import Residency

logger = init_logger("vllm.pie")

LOG_SECONDS = 10.0
"""Least time between two lines of totals, in seconds."""

REPORT_SECONDS = 0.1
"""Least time between two reports to the front end while requests run, in seconds. A report costs
the scheduler tens of microseconds, and Prometheus asks every few seconds."""


class Hits(NamedTuple):
    """Blocks that requests found in the prefix cache, by the place of their KV.

    Attributes:
        resident: number of blocks found in device memory.
        pooled: number of blocks found that were pooled.
        parked: number of blocks found parked in CPU memory.
    """

    resident: int = 0
    pooled: int = 0
    parked: int = 0


class Control(NamedTuple):
    """The decision of the last step, and the scheduler's own sums since the start.

    Attributes:
        limit: number of pooled blocks in use above which no waiting request is admitted.
        budget: maximum number of pooled blocks that the step may load.
        bandwidth: bytes per second from CPU memory to the device; 0 while unknown.
        left_out: number of times that a running request was left out of a step.
        pool_chunks: number of chunks of the pool that the worker holds.
        streaming_seconds: duration of all steps that loaded KV, in seconds.
        slowed_seconds: estimated seconds by which loads slowed the compute beside them.
        recomputed_tokens: number of tokens that preempted requests computed again.
        hits: prefix-cache hits, in blocks.
        head_waits: number of steps in which the head of the queue was passed over, by reason.
        failed_copies: number of steps in which a copy failed.
    """

    limit: int
    budget: int
    bandwidth: int
    left_out: int
    pool_chunks: int
    streaming_seconds: float
    slowed_seconds: float
    recomputed_tokens: int
    hits: Hits
    head_waits: Mapping[str, int] = {}
    failed_copies: int = 0


MICROSECONDS = 1e6
"""Microseconds in a second: times travel as whole microseconds."""

HEAD_WAITS = "pie_head_waits"
"""Name of the counter by reason; each reason travels under the name ``name:reason``."""


class Report:
    """What the front end has not been told yet, in whole numbers.

    Each report of vLLM's scheduler reaches only one front-end process. Counters therefore travel
    as increments, which add up over the processes. ``prometheus.py`` has the names.
    """

    def __init__(self, geometry: Geometry) -> None:
        """Start with nothing told; the first report carries the sizes."""
        self._counters: dict[str, int] = {}
        self._gauges: dict[str, int] = {}
        self._sizes = {
            "pie_resident_blocks": geometry.resident_blocks,
            "pie_pooled_blocks": geometry.pooled_blocks,
            "pie_capacity_gained_blocks": geometry.capacity_gained_blocks,
            "pie_ring_bytes": geometry.ring_bytes,
            "pie_pool_ceiling_bytes": geometry.host_bytes,
        }
        self._geometry = geometry
        self._due = -math.inf

    def due(self, *, last: bool) -> bool:
        """Whether a step brings a report: ``REPORT_SECONDS`` after the one before, or as the last.

        Args:
            last: whether no request runs any more, so that no step may follow for hours.
        """
        now = time.monotonic()
        if now < self._due and not last:
            return False
        self._due = now + REPORT_SECONDS
        return True

    def changes(self, totals: Totals, residency: Residency, control: Control) -> dict[str, int]:
        """Increments of counters and new values of gauges since the last call.

        Args:
            totals: the worker's newest sums.
            residency: the state of both tiers.
            control: the newest decision and the scheduler's sums.

        Returns:
            Value by name; times in microseconds. It is empty when nothing changed.
        """
        gauges = {
            "pie_resident_blocks_used": residency.residents_in_use,
            "pie_pooled_blocks_used": residency.pooled_in_use,
            "pie_pooled_blocks_read": residency.read_set.num_blocks,
            "pie_admission_limit_blocks": control.limit,
            "pie_step_budget_blocks": control.budget,
            "pie_link_bytes_per_second": control.bandwidth,
            "pie_parked_blocks": len(residency.parking),
            "pie_pool_bytes": self._geometry.bytes_of_chunks(control.pool_chunks),
        }
        counters = {
            "pie_streaming_steps": totals.steps,
            "pie_graph_steps": totals.graph_steps,
            "pie_loaded_bytes": totals.bytes_loaded,
            "pie_stored_bytes": totals.bytes_stored,
            "pie_load_seconds": int(totals.load_seconds * MICROSECONDS),
            "pie_store_seconds": int(totals.store_seconds * MICROSECONDS),
            "pie_stall_seconds": int(totals.stall_seconds * MICROSECONDS),
            "pie_streaming_seconds": int(control.streaming_seconds * MICROSECONDS),
            "pie_slowed_seconds": int(control.slowed_seconds * MICROSECONDS),
            "pie_demoted_blocks": residency.demotions,
            "pie_promoted_blocks": residency.promotions,
            "pie_left_out_requests": control.left_out,
            "pie_recomputed_tokens": control.recomputed_tokens,
            "pie_parked_stores": residency.parking.parked_blocks,
            "pie_parked_ahead": residency.parking.ahead_blocks,
            "pie_parked_losses": residency.parking.lost_blocks,
            "pie_restored_blocks": residency.parking.restored_blocks,
            "pie_resident_hits": control.hits.resident,
            "pie_pooled_hits": control.hits.pooled,
            "pie_parked_hits": control.hits.parked,
            "pie_failed_copies": control.failed_copies,
        }
        counters |= {f"{HEAD_WAITS}:{why}": steps for why, steps in control.head_waits.items()}
        changed = {**self._sizes}
        self._sizes = {}
        if gauges != self._gauges:
            changed |= gauges
            self._gauges = gauges
        if counters != self._counters:
            told = self._counters
            changed |= {name: n - told.get(name, 0) for name, n in counters.items()}
            self._counters = counters
        return changed


class StepLog:
    """Writes one line of totals every ``LOG_SECONDS`` while steps copy KV.

    Attributes:
        totals: the worker's newest sums.
    """

    def __init__(self, residency: Residency, detector: Detector, waits: HeadWaits) -> None:
        """Start the clock of the first line."""
        self._residency = residency
        self._detector = detector
        self._waits = waits
        self._due = time.monotonic() + LOG_SECONDS
        self.totals = self._told = Totals()

    def record(self, totals: Totals) -> None:
        """Note the newest totals, and write them when a line is due."""
        self.totals = totals
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write the line, unless nothing has happened since the last one."""
        self._due = time.monotonic() + LOG_SECONDS
        totals, residency = self.totals, self._residency
        if totals == self._told:
            return
        self._told = totals
        logger.info(
            "Pie: steps=%d pooled=%d pooled_peak=%d pooled_blocks=%d bytes_loaded=%d "
            "bytes_stored=%d load_seconds=%.3f store_seconds=%.3f stall_seconds=%.3f "
            "slowed_seconds=%.3f graph_steps=%d parked=%d parked_stores=%d ahead=%d restored=%d "
            "head_waits=%s",
            totals.steps,
            residency.pooled_in_use,
            totals.pooled_peak,
            residency.window,
            totals.bytes_loaded,
            totals.bytes_stored,
            totals.load_seconds,
            totals.store_seconds,
            totals.stall_seconds,
            self._detector.slowed_seconds,
            totals.graph_steps,
            len(residency.parking),
            residency.parking.parked_blocks,
            residency.parking.ahead_blocks,
            residency.parking.restored_blocks,
            self._waits.news(),
        )


def counters(llm: Any) -> dict[str, Any]:
    """Totals and sizes of the first worker of a ``vllm.LLM`` that uses pie.

    Returns:
        The fields of Totals; the sizes ``resident_blocks``, ``pooled_blocks``, ``ring_slots``,
        ``ring_bytes``, ``host_bytes`` (maximum of the pool), ``device_bytes``,
        ``idle_cost_blocks``, ``page_bytes``, ``num_layers``, ``draft_layers``, ``draft_bytes``
        (their pages of pooled blocks) and ``rows``; ``pool_bytes``, the bytes that the pool holds;
        ``pool_refused``, the number of times that memory for the pool could not be had;
        ``pool_table_bytes``, the device memory reserved for page tables of the pool.
    """
    return dict(llm.collective_rpc("pie_counters")[0])

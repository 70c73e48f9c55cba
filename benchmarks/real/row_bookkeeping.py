"""How much memory the scheduler's books take for each parked row."""

from __future__ import annotations

import gc
import tracemalloc

from benchmarks.real.parked_context import ParkedContext

POOL_FILES = "*/pie_vllm/policy/pool/*"
"""Files whose memory counts: ledger of rows, parked blocks, their order of eviction."""


def bookkeeping_bytes(parked: int) -> float:
    """Bytes that the pool's books take for each of so many parked blocks, about.

    The keys are vLLM's objects and come on top: 69 bytes each. Books that grow with the rows of
    the pool rather than with the parked blocks count in full.
    """
    tracemalloc.start()
    try:
        context = ParkedContext(64, rows=parked)
        gc.collect()
        found = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(inclusive=True, filename_pattern=POOL_FILES)]
        )
        residency = context.side.scheduler.kv_cache_manager.residency
        return sum(trace.size for trace in found.traces) / len(residency.parking)
    finally:
        tracemalloc.stop()

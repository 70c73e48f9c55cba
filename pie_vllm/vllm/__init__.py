"""Seam to vLLM: the only folder that imports it."""

from __future__ import annotations

from typing import Any

__all__ = ["PieBlockSpaceManager", "PieCacheEngine", "counters"]


def __getattr__(name: str) -> Any:
    """Import the public classes on first use: vLLM loads this package early."""
    if name == "PieBlockSpaceManager":
        from pie_vllm.vllm.scheduler_side.manager import PieBlockSpaceManager

        return PieBlockSpaceManager
    if name == "PieCacheEngine":
        from pie_vllm.vllm.worker_side.cache_engine import PieCacheEngine

        return PieCacheEngine
    if name == "counters":
        from pie_vllm.vllm.scheduler_side.metrics import counters

        return counters
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

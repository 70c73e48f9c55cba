"""What can be reached of an engine that runs in this process."""

from __future__ import annotations

from typing import Any


def scheduler_of(llm: Any) -> Any:
    """The scheduler of a `vllm.LLM`, with VLLM_ENABLE_V1_MULTIPROCESSING=0."""
    return llm.llm_engine.engine_core.engine_core.scheduler

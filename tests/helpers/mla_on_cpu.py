"""MLA with cached context on a CPU without AMX.

vLLM's CPU_MLA reads the context of a prompt like every MLA backend, but vLLM turns chunked
prefill and prefix caching off for it, and leaves them on for AMX_MLA alone
(platforms/cpu.py:516). Here they stay as they were asked for.
"""

from __future__ import annotations

import os
from typing import Any

ENVIRONMENT = {"PIE_TEST_MLA_CONTEXT": "1"}
"""Of a process that is to call ``enable``."""


def enable() -> None:
    """Before an engine is configured: keep these settings in this process, if it is asked to."""
    if not os.environ.get("PIE_TEST_MLA_CONTEXT"):
        return
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: Any, vllm_config: Any) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        kept = (
            (scheduler, "enable_chunked_prefill", scheduler.enable_chunked_prefill),
            (scheduler, "max_num_batched_tokens", scheduler.max_num_batched_tokens),
            (cache, "enable_prefix_caching", cache.enable_prefix_caching),
        )
        check(cls, vllm_config)
        for owner, name, value in kept:
            setattr(owner, name, value)

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)

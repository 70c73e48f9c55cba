"""vLLM's V2 model runner on a CPU: its Triton kernels run in Triton's interpreter.

vLLM has a V2 runner for CPUs but wants a Triton that compiles for them. Here
vLLM is told that there is one, and the interpreter runs the kernels, slowly.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
"""Of a process that is to call ``enable``."""

ASYNC = "PIE_TEST_ASYNC_SCHEDULING"
"""Set in the environment, vLLM keeps two steps in flight; on CPUs it does not by itself."""


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver


def enable() -> None:
    """Before vLLM is imported: make it use its V2 runner in this process, if it is asked to."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    # vLLM looks for one of this name, triton_utils/importing.py:36.
    importlib.import_module("triton.backends").backends["cpu"] = _Backend()
    from vllm.v1.worker.cpu import shm  # noqa: F401  # Makes torch's streams and events no-ops.
    from vllm.v1.worker.gpu.sample import sampler

    # The kernel looks at each logit in Python; greedy requests need no more than this.
    sampler.gumbel_sample = _greedy
    if os.environ.get(ASYNC):
        _keep_async_scheduling()


def _greedy(logits: Any, mapping: Any, temperature: Any, *_: Any, **__: Any) -> Any:
    assert not temperature[mapping].any()
    return logits.argmax(dim=-1)


def _keep_async_scheduling() -> None:
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)

"""Where vLLM says that weights changed.

Read in vLLM 0.32.0 and 0.33.0; as in ``compat``, each line relied on is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.engine.core import EngineCore

from pie_vllm.vllm.compat import expect, wrapped_once

NEW_WEIGHTS = ("reload_weights", "reset_weights", "update_weights", "finish_weight_update")
"""Worker methods after which KV is that of other weights, v1/worker/gpu_worker.py:380-1587."""


def after_new_weights(then: Callable[[Any], None]) -> None:
    """Call ``then(engine_core)`` after each call of the workers that may change weights.

    A call that fails counts too: some of the weights may be new. Relies on every such call going
    through ``EngineCore.collective_rpc``, v1/engine/core.py:1073.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(self, method, *args, **kwargs)
            finally:
                if method in NEW_WEIGHTS:
                    then(self)

        return collective_rpc

    wrapped_once(EngineCore, "collective_rpc", wrap)


def check_weights() -> None:
    """Check the line that ``after_new_weights`` relies on."""
    expect(
        EngineCore.collective_rpc,
        "return self.model_executor.collective_rpc(method, timeout, args, kwargs)",
    )

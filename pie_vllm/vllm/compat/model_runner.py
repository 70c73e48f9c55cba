"""vLLM's model runners: picks the module that knows the one at hand, V1 or V2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from pie_vllm.vllm.compat import runner_v1


def is_v2(runner: Any) -> bool:
    """Whether a model runner is vLLM's V2 runner, whose request slots are ``req_states``.

    Relies on v1/worker/gpu/model_runner.py:323; the V1 runner has ``input_batch`` in its place.
    """
    return hasattr(runner, "req_states")


def of(runner: Any) -> ModuleType:
    """The module that knows this kind of runner; V2's is imported only where such a runner is."""
    if not is_v2(runner):
        return runner_v1
    from pie_vllm.vllm.compat import runner_v2

    return runner_v2


def own_allocation(runner: Any, allocate: Callable[..., Any]) -> AbstractContextManager[None]:
    """Make a model runner get its KV tensors from ``allocate``."""
    swap: AbstractContextManager[None] = of(runner).own_allocation(allocate)
    return swap


def before_inputs(runner: Any, then: Callable[[Any], None]) -> None:
    """Call ``then(scheduler_output)`` when a model runner updates its states for a step.

    The runner becomes one of a subclass once it is made: ``Worker._make_model_runner`` exists on
    CUDA alone, vLLM's CPU worker makes its runner in ``init_device`` (v1/worker/cpu_worker.py:168).
    """
    of(runner).before_inputs(runner, then)


def relabel_rows(runner: Any, relabels: Any, group: int) -> None:
    """Write new block ids into a runner's block table of a group.

    Raises:
        UnsupportedError: a relabel names a request or a block that the runner does not know.
    """
    of(runner).relabel_rows(runner, relabels, group)


def forward_pass(runner: Any) -> Callable[[int], float]:
    """A function that runs a pass over so many tokens, without attention, and returns its seconds.

    The tokens are those of as many decoding requests, up to ``--max-num-seqs``. There is no KV
    cache yet.
    """
    one_pass: Callable[[int], float] = of(runner).forward_pass(runner)
    return one_pass

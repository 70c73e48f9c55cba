"""How the failure of a worker is heard of."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

from vllm.logger import init_logger

from pie_vllm.errors import PieError

logger = init_logger("vllm.pie")


def said_once(start: Callable[..., Any]) -> Callable[..., Any]:
    """Log a PieError in one line: vLLM's traceback of a worker that fails is long."""

    @wraps(start)
    def say(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return start(self, *args, **kwargs)
        except PieError as error:
            logger.error("Pie: cannot start: %s", error)
            raise

    return say


def end_rank(rank: int, error: PieError) -> NoReturn:
    """End this rank's process, and with it the engine: one of several ranks failed in a step.

    vLLM would go on. It asks for the tokens of a step without a look at whether the step failed,
    and hears of failures from one rank only (v1/engine/core.py:743,
    v1/executor/multiproc_executor.py:1059).
    """
    logger.error("Pie: a step failed on rank %d: %s", rank, error)
    raise SystemExit(1) from error

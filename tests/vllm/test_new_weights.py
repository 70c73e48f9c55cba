"""After new weights nothing in the pool is hit any more, though vLLM keeps its prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.core import EngineCore

from pie_vllm.vllm import compat_weights
from pie_vllm.vllm.plugin import engage
from tests.helpers.fuzz import BLOCK_SIZE
from tests.helpers.parked_chats import cached_tokens, chat_then_others, driver, parking
from tests.helpers.scheduling import Driver, make_request

pytestmark = pytest.mark.vllm


def core_of(made: Driver, workers: Callable[..., Any]) -> Any:
    """vLLM's engine core over a driver's scheduler; ``workers`` take the calls."""
    engage()
    core = EngineCore.__new__(EngineCore)
    core.scheduler = made.scheduler
    core.model_executor = SimpleNamespace(collective_rpc=workers)  # type: ignore[assignment]
    return core


def found_after(call: Callable[[Any], None], workers: Callable[..., Any]) -> int:
    """Tokens that the next turn of a parked chat finds after a call of the workers."""
    made = driver()
    history = chat_then_others(made)
    assert len(parking(made)) >= 10
    call(core_of(made, workers))
    made.add(make_request("next", [*history, 1, 2, 3], 5, BLOCK_SIZE))
    made.step()
    made.scheduler.kv_cache_manager.residency.check_integrity()
    return cached_tokens(made, "next")


@pytest.mark.parametrize("method", compat_weights.NEW_WEIGHTS)
def test_new_weights_forget_what_is_parked(method: str) -> None:
    """Whichever way they come; the call gets through to the workers."""
    calls: list[Any] = []
    found = found_after(lambda core: core.collective_rpc(method), lambda *a: calls.append(a))
    assert found == 0
    assert calls == [(method, None, (), None)]


def test_other_calls_of_the_workers_forget_nothing() -> None:
    """The test above can fail."""
    assert found_after(lambda core: core.collective_rpc("list_loras"), lambda *_: []) > 0


def test_weights_that_failed_to_load_count_as_new() -> None:
    """Some of them may be."""

    def fails(*_: Any) -> None:
        raise RuntimeError("no such file")

    def call(core: Any) -> None:
        with pytest.raises(RuntimeError, match="no such file"):
            core.collective_rpc("reload_weights")

    assert found_after(call, fails) == 0


def test_the_line_of_vllm_is_there() -> None:
    """Also once it is patched."""
    engage()
    compat_weights.check_weights()

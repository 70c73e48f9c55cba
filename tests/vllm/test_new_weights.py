"""After new weights nothing cached is hit any more, though vLLM keeps its prefix cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import WorkerBase

from pie_vllm.vllm.compat import weights
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


@pytest.mark.parametrize("method", weights.NEW_WEIGHTS)
def test_new_weights_forget_what_is_parked(method: str) -> None:
    """Whichever way they come; the call gets through to the workers."""
    calls: list[Any] = []
    found = found_after(lambda core: core.collective_rpc(method), lambda *a: calls.append(a))
    assert found == 0
    assert calls == [(method, None, (), None)]


@pytest.mark.parametrize("method", ["list_loras", "pin_lora", "save_sharded_state"])
def test_other_calls_of_the_workers_forget_nothing(method: str) -> None:
    """The test above can fail."""
    assert found_after(lambda core: core.collective_rpc(method), lambda *_: []) > 0


@pytest.mark.parametrize("method", ["update_named_param", lambda worker: worker])
def test_calls_that_nobody_knows_count_as_new_weights(method: Any) -> None:
    """Of a class of --worker-extension-cls, or a function: trainers send weights in this way."""
    assert found_after(lambda core: core.collective_rpc(method), lambda *_: []) == 0


def test_every_method_of_the_workers_is_classified() -> None:
    """A method of a new release is looked at before it is taken for harmless."""
    known = {*weights.NEW_WEIGHTS, *weights.SAME_WEIGHTS}
    methods = {
        name
        for worker in (WorkerBase, Worker, CPUWorker)
        for name, value in vars(worker).items()
        if callable(value) and not name.startswith("_")
    }
    assert not methods - known
    assert not set(weights.NEW_WEIGHTS) & set(weights.SAME_WEIGHTS)


def test_pies_own_calls_of_the_workers_are_no_new_weights() -> None:
    """To read the counters must not forget the prefix cache."""
    sources = Path(weights.__file__).parents[1].rglob("*.py")
    text = "".join(source.read_text() for source in sources)
    called = set(re.findall(r'collective_rpc\("(\w+)"\)', text))
    assert {"pie_counters", "pie_geometry"} <= called
    assert called <= set(weights.SAME_WEIGHTS)


LORA = LoRARequest("a", 1, "/a")


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda core: core.add_lora(LoRARequest("a", 1, "/a", load_inplace=True)), 0),
        (lambda core: core.remove_lora(1), 0),
        (lambda core: core.add_lora(LORA), 160),
        (lambda core: core.pin_lora(1), 160),
        (lambda core: core.list_loras(), 160),
        (lambda core: core.reset_mm_cache(), 160),
        (lambda core: core.reset_encoder_cache(), 160),
        (lambda core: core.set_weight_version("2"), 160),
        (lambda core: core.reset_prefix_cache(), 0),
        (lambda core: core.reset_prefix_cache(True, True), 0),
        (lambda core: core.pause_scheduler("keep", clear_cache=False), 160),
        (lambda core: core.pause_scheduler("keep", clear_cache=True), 0),
        (lambda core: core.pause_scheduler("abort", clear_cache=False), 160),
        (lambda core: core.sleep(0, "keep"), 160),
        (lambda core: core.sleep(1, "keep"), 0),
    ],
)
def test_what_each_call_of_the_engine_leaves_parked(call: Any, known: int) -> None:
    """The rows of docs/stale_kv.md, for a chat with an adapter."""
    made = driver()
    history = chat_then_others(made, lora_request=LORA)
    core = core_of(made, lambda *_, **__: [])
    executor = core.model_executor
    for name in ("add_lora", "remove_lora", "pin_lora", "list_loras", "sleep", "wake_up"):
        setattr(executor, name, lambda *_: True)
    executor.reset_mm_cache = executor.reset_encoder_cache = lambda: None
    core.mm_receiver_cache = None
    call(core)
    core.resume_scheduler()
    made.add(make_request("next", [*history, 1, 2, 3], 5, BLOCK_SIZE, lora_request=LORA))
    made.step()
    assert cached_tokens(made, "next") == known


def test_a_reset_that_vllm_refuses_forgets_nothing() -> None:
    """While a request holds blocks, vLLM goes on to serve what it has cached."""
    made = driver()
    history = chat_then_others(made)
    made.add(make_request("runs", [5] * 20, 30, BLOCK_SIZE))
    made.step()
    assert not core_of(made, lambda *_: []).reset_prefix_cache()
    made.add(make_request("next", [*history, 1, 2, 3], 5, BLOCK_SIZE))
    made.step()
    assert cached_tokens(made, "next") == 160


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
    weights.check_weights()

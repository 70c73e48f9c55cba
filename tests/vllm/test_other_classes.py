"""Another scheduler or worker class in place of pie's is refused by name, never wrong tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from pie_vllm.errors import UnsupportedError
from pie_vllm.plan import PoolOrder, StepOrders
from pie_vllm.vllm import args as pie_args
from pie_vllm.vllm.plugin import engage
from pie_vllm.vllm.worker_side.worker import PieWorkerMixin

pytestmark = pytest.mark.vllm

FOREIGN = "theirs.Scheduler"


def pie_arguments(model: Path) -> EngineArgs:
    config = {"block_manager": "pie", "pie": {"pool_gib": 0.1}}
    return EngineArgs(
        model=str(model),
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        max_model_len=512,
        additional_config=config,
    )


@pytest.mark.parametrize(
    ("part", "name", "found", "words"),
    [
        ("scheduler_config", "scheduler_cls", FOREIGN, ["scheduler class 'theirs.Scheduler'"]),
        ("scheduler_config", "scheduler_cls", Scheduler, ["scheduler class", "sched.scheduler"]),
        ("scheduler_config", "scheduler_cls", None, ["scheduler class None"]),
        ("parallel_config", "worker_cls", "theirs.Worker", ["worker class 'theirs.Worker'"]),
    ],
)
def test_another_plugins_class_is_refused(
    model: Path, part: str, name: str, found: Any, words: list[str]
) -> None:
    """Inside of ``create_engine_config``, and after it: when the engine starts."""
    made = pie_arguments(model).create_engine_config()

    def theirs(_: Any) -> Any:
        setattr(getattr(made, part), name, found)
        return made

    inside = pie_args.with_pie(engage, theirs)
    with pytest.raises(UnsupportedError) as caught:
        inside(pie_arguments(model))
    engage()
    with pytest.raises(UnsupportedError) as later:
        EngineCore.__new__(EngineCore)._initialize_kv_caches(made)
    for error in (caught, later):
        for word in [*words, "in place of pie_vllm", "VLLM_PLUGINS", "--block-manager default"]:
            assert word in str(error.value)


@pytest.mark.parametrize("config", [None, {}, {"block_manager": "pie", "pie": {}}])
def test_settings_that_another_plugin_has_replaced_are_missed(model: Path, config: Any) -> None:
    """By name, where the finished configuration is looked at."""
    made = pie_arguments(model).create_engine_config()

    def theirs(_: Any) -> Any:
        made.additional_config = config
        return made

    with pytest.raises(UnsupportedError, match=r"additional_config\[.*another plugin"):
        pie_args.with_pie(engage, theirs)(pie_arguments(model))


class Stock:
    """A worker that answers every step."""

    def compile_or_warm_up_model(self) -> str:
        return str(self.execute_model(SimpleNamespace(total_num_scheduled_tokens=0)))

    def execute_model(self, _: Any) -> str:
        return "answered"


def test_a_step_without_a_plan_is_refused_outside_warm_up() -> None:
    """It answered 0 of 10 requests rightly; vLLM's warm-up makes steps of its own."""

    class Worker(PieWorkerMixin, Stock):
        vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1))

        def _tag(self, output: Any) -> Any:
            return output

    class Nothing:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    worker = Worker()
    engine = SimpleNamespace(
        step=lambda *_: Nothing(),
        warm_up=lambda *_: Nothing(),
        keeper=SimpleNamespace(follow=lambda _: None),
    )
    worker.pie, worker.model_runner = engine, None  # type: ignore[assignment]
    assert worker.compile_or_warm_up_model() == "answered"
    step = SimpleNamespace(total_num_scheduled_tokens=0)
    with pytest.raises(UnsupportedError, match=r"without a plan.*another scheduler"):
        worker.execute_model(step)
    step.pie = StepOrders(None, PoolOrder(1))
    assert worker.execute_model(step) == "answered"

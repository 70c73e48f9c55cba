"""A copy that fails costs its requests a recompute, and nobody anything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from pie_vllm.errors import CopyError, TransferError
from pie_vllm.plan import StepPlan
from pie_vllm.vllm.worker_side import gate
from pie_vllm.vllm.worker_side.cache_engine import PieCacheEngine
from tests.helpers import fuzz, scheduling
from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats, tokens
from tests.helpers.engine_model import LAYERS
from tests.helpers.failing import FailingMemory, HonestRunner
from tests.helpers.fuzz import (
    BLOCK_SIZE,
    Case,
    nothing_left,
    play,
    random_case,
    random_drafts,
    random_groups_preempted,
    random_preemptions,
)
from tests.helpers.noting_engine import LAYERS as GATES
from tests.helpers.noting_engine import PLAN, STREAM, Engine, in_place, opened
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.states import groups_beside

pytestmark = pytest.mark.vllm


class LengthDriver(Driver):
    """Knows how long each answer must be, and which requests ended with an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths: dict[str, int] = {}
        self.errors: list[str] = []
        update = self.scheduler.update_from_output

        def noted(output: Any, result: Any) -> Any:
            found = update(output, result)
            self.errors += [
                one.request_id
                for outputs in found.values()
                for one in outputs.outputs
                if one.finish_reason == FinishReason.ERROR
            ]
            return found

        self.scheduler.update_from_output = noted

    def add(self, request: Any) -> None:
        super().add(request)
        self.lengths[request.request_id] = request.max_tokens

    def verify(self) -> None:
        """Also that no answer lacks a token."""
        super().verify()
        for name, answer in self.answers.items():
            wrong = name not in self.errors and len(answer) != self.lengths[name]
            assert not wrong, f"{name} lacks tokens"


def driver_of(case: fuzz.Case, share: float, seed: int) -> LengthDriver:
    """A scheduler of the case's kind, over memory whose copies fail."""
    options = {name: value for name, value in case.options.items() if name != "chance"}
    scheduler = scheduling.make(case.geometry, BLOCK_SIZE, **options)
    scheduler.pie_controller.decider = case.decider()
    scheduler.pie_controller.pool = case.pool() or scheduler.pie_controller.pool
    memory = FailingMemory(case.geometry, BLOCK_SIZE, share, seed)
    in_flight = 1 + case.options["async_scheduling"]
    beside = groups_beside(**case.options)
    drafting = fuzz.drafting_of(**case.options)
    runner = HonestRunner(memory, BLOCK_SIZE, len(beside), beside, drafting=drafting)
    return LengthDriver(scheduler, runner, in_flight=in_flight)


def run(
    seed: int,
    share: float = 0.05,
    asynchronous: bool | None = None,
    draw: Callable[..., Case] = random_case,
) -> Counter[str]:
    """Play one random case; returns how often what happened."""
    case = draw(seed, asynchronous=asynchronous)
    driver = driver_of(case, share, seed)
    play(driver, case)
    recovery, memory = driver.scheduler.pie_recovery, driver.runner.memory
    assert recovery.failures == memory.failures
    assert not driver.errors
    residency = driver.scheduler.kv_cache_manager.residency
    return Counter(
        steps=driver.steps,
        failures=memory.failures,
        demotions=residency.demotions,
        promotions=residency.promotions,
        parked=residency.parking.parked_blocks,
        restored=residency.parking.restored_blocks,
        accepted=driver.runner.accepted,
        rejected=driver.runner.rejected,
    )


def played(monkeypatch: pytest.MonkeyPatch, seeds: int, **options: Any) -> Counter[str]:
    """Play random cases, each as ``run``, in which copies fail in any number of steps."""
    monkeypatch.setattr("pie_vllm.vllm.scheduler_side.recovery.MOST_IN_A_ROW", 1000)
    return sum((run(seed, **options) for seed in range(seeds)), Counter())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_answers_are_right_whatever_fails(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step and two in flight; the books agree after each, and nothing is lost.

    The model reads what is there, so an answer is right only where each of its tokens came from a
    step whose context was right.
    """
    total = played(monkeypatch, 20, asynchronous=asynchronous)
    assert total["steps"] > 4000
    assert total["failures"] > 100
    assert total["demotions"] > 500
    assert total["promotions"] > 10
    assert total["parked"] > 300
    assert total["restored"] > 20


def test_what_preempted_requests_keep_by_name_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a prefix cache: what a failed step spoilt of it is forgotten, too."""
    total = played(monkeypatch, 12, asynchronous=True, draw=random_preemptions)
    for what in ("failures", "parked", "restored"):
        assert total[what] > 20, what


@pytest.mark.parametrize("asynchronous", [False, True])
def test_windows_and_states_of_steps_that_failed_are_not_trusted(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of who runs nor those that preempted requests keep or have just got back."""
    total = played(monkeypatch, 16, asynchronous=asynchronous, draw=random_groups_preempted)
    for what in ("failures", "parked", "restored"):
        assert total[what] > 20, what


@pytest.mark.parametrize("asynchronous", [False, True])
def test_drafts_after_a_failure_are_verified_again(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in flight begins where the one before it accepted, not where it was scheduled."""
    total = played(monkeypatch, 12, asynchronous=asynchronous, draw=random_drafts)
    for what in ("failures", "demotions", "parked", "restored", "accepted", "rejected"):
        assert total[what] > 20, what


def small_driver(share: float, *, asynchronous: bool, **options: Any) -> LengthDriver:
    """Eight residents, twenty pooled blocks and many rows."""
    sizes = scheduling.geometry(8, 20, 60)
    scheduler = scheduling.make(sizes, BLOCK_SIZE, async_scheduling=asynchronous, **options)
    runner = HonestRunner(FailingMemory(sizes, BLOCK_SIZE, share, 1), BLOCK_SIZE)
    return LengthDriver(scheduler, runner, in_flight=1 + asynchronous)


def prompt(number: int, blocks: int) -> list[int]:
    return [(7 * number + i) % 997 for i in range(BLOCK_SIZE * blocks)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_where_every_copy_fails_those_who_need_one_end_with_an_error(asynchronous: bool) -> None:
    """They alone; who fits the device gets its answer, and nobody waits for ever."""
    driver = small_driver(1.0, asynchronous=asynchronous)
    for number, blocks in enumerate((12, 2, 10, 1)):
        driver.add(make_request(f"r{number}", prompt(number, blocks), 40, BLOCK_SIZE))
    driver.run()
    driver.verify()
    assert sorted(driver.errors) == ["r0", "r2"]
    driver.runner.memory.share = 0.0
    driver.add(make_request("again", prompt(0, 12), 40, BLOCK_SIZE))
    driver.run()
    driver.verify()
    assert len(driver.answers["again"]) == 40
    nothing_left(driver)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_that_is_lost_is_not_trusted(asynchronous: bool) -> None:
    """With --enable-fault-tolerance vLLM ends all requests after an error, and goes on."""
    for lost in range(1, 24):
        driver = small_driver(0.0, asynchronous=asynchronous, enable_prefix_caching=True)
        scheduler = driver.scheduler
        scheduler.parallel_config.enable_fault_tolerance = True
        for number, blocks in enumerate((5, 4, 6)):
            driver.add(make_request(f"r{number}", prompt(number, blocks), 30, BLOCK_SIZE))
        for _ in range(lost):
            driver.step()
        scheduler.schedule()  # The step that fails: nothing of it is carried out.
        driver.queue.clear()
        scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        driver.answers.clear()
        driver.prompts.clear()
        for number, blocks in enumerate((5, 4, 6)):
            driver.add(make_request(f"n{number}", prompt(number, blocks), 30, BLOCK_SIZE))
        driver.run()
        driver.verify()


class Attention:
    """Stands for an attention implementation of vLLM."""

    def do_kv_cache_update(self) -> str:
        return "written"

    def forward(self) -> str:
        return "read"


def gated(monkeypatch: pytest.MonkeyPatch) -> tuple[PieCacheEngine, Engine, list[Any]]:
    """A cache engine over one that notes its calls, and the attention of each layer."""
    in_place(monkeypatch)
    pie, engine = opened(full_graphs=False)
    layers: list[Any] = [Attention() for _ in range(GATES)]
    for layer, attention in enumerate(layers):
        gate.install(attention, layer, pie._switch)
    return pie, engine, layers


def forward(pie: PieCacheEngine, plan: StepPlan, layers: list[Any]) -> None:
    """One step of all layers."""
    with pie.step(plan, STREAM):
        found = [(a.do_kv_cache_update(), a.forward()) for a in layers]
        assert found == [("written", "read")] * GATES


@pytest.mark.parametrize("name", ["before_write", "before_attention", "after_attention"])
def test_the_pass_goes_on_without_gates(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The engine is ready for the next step at once, and hears of loads that it may have missed."""
    pie, engine, layers = gated(monkeypatch)
    noted = getattr(engine, name)

    def fails(layer: int) -> None:
        noted(layer)
        if layer == 1:
            raise CopyError("broken")

    setattr(engine, name, fails)
    forward(pie, PLAN, layers)
    assert str(pie.failure) == "broken"
    assert engine.calls[-2:] == [(name, 1), "abort_step"]
    assert pie.totals.steps == 0
    delattr(engine, name)
    begun: list[Any] = []
    begin = engine.begin_step

    def begins(plan: StepPlan, *args: Any, **kwargs: Any) -> bool:
        begun.append(plan.loads)
        return begin(plan, *args, **kwargs)

    monkeypatch.setattr(engine, "begin_step", begins)
    engine.calls.clear()
    for step in (2, 3):
        engine.calls.clear()
        forward(pie, PLAN._replace(step=step, loads=None), layers)
    assert [loads is PLAN.loads for loads in begun] == [True, False]
    assert begun[1] is None
    assert pie.failure is None
    assert pie.totals.steps == 2


def test_failures_around_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that fail at the start, at the end, or when idle."""
    pie, engine, layers = gated(monkeypatch)

    def fails(*_: Any, **__: Any) -> None:
        raise CopyError("broken")

    for number, name in enumerate(("begin_step", "end_step", "run_idle"), 2):
        plan = PLAN._replace(step=number, forward=name != "run_idle")
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, fails, raising=False)
            with pie.step(plan, STREAM):
                for attention in layers:
                    attention.forward()
        assert str(pie.failure) == "broken", name
        assert engine.calls[-1] == "abort_step"
    with pie.step(None, STREAM):
        pass
    assert pie.failure is None


def test_a_device_that_is_lost_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both errors are named."""
    pie, engine, layers = gated(monkeypatch)

    def fails(text: str) -> Any:
        def call(*_: Any) -> None:
            raise CopyError(text)

        return call

    monkeypatch.setattr(engine, "before_attention", fails("first"), raising=False)
    monkeypatch.setattr(engine, "abort_step", fails("context lost"), raising=False)
    with pytest.raises(TransferError, match=r"cannot go on: first; then context lost"):
        forward(pie, PLAN, layers)


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    """As the negative controls'."""
    return Setup(few, len(LAYERS), 18, 60, dtype="float32")


CHATS = [request(text, max_tokens=16) for text in chats(12, 4, 8)]
FAILING = [
    ("stores", 1, "store", 1),
    ("loads", 2, "load", 1),
    ("stores", 1, "store", 4),
    ("loads", 3, "load", 5),
    ("loads", 0, "load", 1),
    ("promotions", 0, "load", 2),
]


@pytest.mark.slow
def test_answers_are_stocks_and_the_engine_lives(engines: Engines, setup: Setup) -> None:
    """Loads, stores and promotions fail, in the first and in later layers of vLLM's own model."""
    failing = [round_(CHATS, failing=FAILING), round_(CHATS)]
    logged = replace(setup, other={"disable_log_stats": False})
    pie, stock = engines.both(logged, failing, setup, [round_(CHATS)])
    right = tokens(stock[0])
    assert [tokens(one) == right for one in pie] == [True, True]
    assert pie[0]["failed"] == pie[1]["failed"] == len(FAILING)
    assert pie[0]["metrics"]["vllm:pie_failed_copies"] == len(FAILING)
    assert pie[0]["preempted"], "nobody was computed again"


@pytest.mark.slow
def test_parked_kv_that_was_not_stored_or_does_not_come_back(
    engines: Engines, setup: Setup
) -> None:
    """Stores ahead and evictions, and blocks copied back for a second turn of the same chats."""
    parked = replace(setup, rows=300, other={"enable_prefix_caching": True})
    rounds = [
        round_(CHATS, failing=[("stores", wait, "store", nth) for wait, nth in ((0, 1), (1, 7))]),
        round_(CHATS, failing=[("promotions", 0, "load", nth) for nth in (1, 3)]),
        round_(CHATS),
    ]
    plain = [round_(CHATS)]
    pie, stock = engines.both(parked, rounds, setup, plain)
    right = tokens(stock[0])
    assert [tokens(one) == right for one in pie] == [True] * 3
    assert pie[2]["failed"] == 4
    assert pie[2]["hits"]["parked"] > 0

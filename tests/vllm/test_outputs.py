"""What travels back with a step's output, now or when it arrives."""

from __future__ import annotations

import gc
import weakref
from abc import ABC, abstractmethod
from typing import Any

import pytest
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

from pie_vllm.plan import PoolState, StepReport, Totals
from pie_vllm.vllm.worker_side.output_tags import DeviceTimer, HostTimer, Tag, tagged, tagged_class

pytestmark = pytest.mark.vllm

POOL = PoolState(3, 0)


class Clock:
    """A timer whose step is over when it is told so."""

    def __init__(self) -> None:
        self.over: float | None = None

    def stop(self) -> None:
        pass

    def seconds(self) -> float:
        assert self.over is not None, "asked before the output arrived"
        return self.over


class Later(AsyncModelRunnerOutput):
    """An output that arrives when it is asked for, at the end of the step."""

    def __init__(self, clock: Clock, output: ModelRunnerOutput) -> None:
        self.clock, self.output = clock, output

    def get_output(self) -> ModelRunnerOutput:
        self.clock.over = 0.25
        return self.output


def test_an_output_is_tagged_on_a_copy() -> None:
    """vLLM shares its empty output between steps."""
    found = tagged(EMPTY_MODEL_RUNNER_OUTPUT, Tag(Totals(steps=5), POOL, None))
    assert found.pie == StepReport(Totals(steps=5), POOL, seconds=0.0, failure="")
    failed = tagged(EMPTY_MODEL_RUNNER_OUTPUT, Tag(Totals(), POOL, None, "a copy failed"))
    assert failed.pie.failure == "a copy failed"
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, "pie")
    assert tagged(None, Tag(Totals(), POOL, None)) is None


def test_an_asynchronous_output_is_tagged_when_it_arrives() -> None:
    """The time of a step is known then; its counters are those of when it was submitted."""
    clock = Clock()
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    later = tagged(Later(clock, output), Tag(Totals(steps=1), POOL, clock))
    assert isinstance(later, AsyncModelRunnerOutput)
    found = later.get_output()
    assert (found.req_ids, found.pie.seconds, found.pie.totals.steps) == (["a"], 0.25, 1)


def test_other_ranks_are_asked_when_the_output_arrives() -> None:
    """Earlier they may not have come to the step; what failed here needs no asking."""
    clock, asked = Clock(), []

    def elsewhere() -> str:
        asked.append(clock.over)
        return "on rank 1: broken"

    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    later = tagged(Later(clock, output), Tag(Totals(), POOL, clock, elsewhere=elsewhere))
    assert asked == []
    assert later.get_output().pie.failure == "on rank 1: broken"
    assert asked == [0.25]
    own = tagged(output, Tag(Totals(), POOL, None, "broken here", elsewhere))
    assert own.pie.failure == "broken here"
    assert asked == [0.25]


def test_two_steps_in_flight_do_not_mix() -> None:
    """The second is submitted before the first one's output is asked for."""
    clocks = [Clock(), Clock()]
    outputs = [ModelRunnerOutput(req_ids=[name], req_id_to_index={name: 0}) for name in "ab"]
    later = [
        tagged(Later(clock, output), Tag(Totals(steps=i), POOL, clock))
        for i, (clock, output) in enumerate(zip(clocks, outputs, strict=True))
    ]
    found = [one.get_output() for one in later]
    assert [(f.req_ids, f.pie.totals.steps) for f in found] == [(["a"], 0), (["b"], 1)]


def test_further_methods_of_other_versions_are_passed_on() -> None:
    """vLLM 0.33 has a second abstract method; a class that lacked it could not be made."""

    class Base(ABC):
        @abstractmethod
        def get_output(self) -> Any: ...

        @abstractmethod
        def get_kv_connector_output(self, which: int) -> Any: ...

    class Inner(Base):
        def get_output(self) -> Any:
            return 1

        def get_kv_connector_output(self, which: int) -> Any:
            return ("connector", which)

    found = tagged_class(Base)(Inner(), lambda output: output + 1)
    assert isinstance(found, Base)
    assert found.get_output() == 2
    assert found.get_kv_connector_output(7) == ("connector", 7)


def test_a_tagged_output_is_no_cycle() -> None:
    """It holds the step's device tensors: they must be free as soon as it is gone."""
    clock = Clock()
    output = Later(clock, ModelRunnerOutput(req_ids=[], req_id_to_index={}))
    alive = weakref.ref(output)
    gc.disable()
    try:
        later = tagged(output, Tag(Totals(), POOL, clock))
        del output
        later.get_output()
        del later
        assert alive() is None
    finally:
        gc.enable()


def test_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's takes its own time; the device's that between two events, in seconds."""
    timer = HostTimer()
    timer.stop()
    first = timer.seconds()
    assert 0 <= first == timer.seconds()
    calls: list[tuple[str, int]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)

        def record(self) -> None:
            calls.append(("record", made.index(self)))

        def synchronize(self) -> None:
            calls.append(("synchronize", made.index(self)))

        def elapsed_time(self, end: Event) -> float:
            assert (made.index(self), made.index(end)) == (0, 1)
            return 12.5

    made: list[Event] = []
    monkeypatch.setattr("torch.cuda.Event", Event)
    device = DeviceTimer()
    assert calls == [("record", 0)]
    device.stop()
    assert device.seconds() == pytest.approx(0.0125)
    assert calls == [("record", 0), ("record", 1), ("synchronize", 1)]

"""What travels back with a step's output: how long the step took, and the engine's counters."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from pie_vllm.plan import PoolState, StepReport, Totals


class Timer(Protocol):
    """Times the forward pass of one step; made where it starts."""

    def stop(self) -> None:
        """The pass has been submitted."""

    def seconds(self) -> float:
        """That it took; called once its output has arrived."""


class HostTimer:
    """Where the device is the calling thread: the time of the calls."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        """As the protocol says."""
        self._seconds = perf_counter() - self._start

    def seconds(self) -> float:
        """As the protocol says."""
        return self._seconds


class DeviceTimer:
    """The device's own time between two events on the compute stream.

    Not the time of the calls, which only submit. It contains what the stream waited
    for copies, and not what the device had left to do of the step before, nor the
    sampling. Where the device is faster than the calls, gaps between kernels count.
    """

    def __init__(self) -> None:
        event: Any = torch.cuda.Event
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._start.record()

    def stop(self) -> None:
        """As the protocol says."""
        self._end.record()

    def seconds(self) -> float:
        """As the protocol says; waits for the device if it has not come so far."""
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


class Tag(NamedTuple):
    """What goes with the output of one step.

    Attributes:
        totals: once the step was submitted, so that steps in flight do not mix.
        pool: what the pool held then.
        timer: of the step; None if it ran no model.
        failure: what failed of its copies; empty if nothing did.
    """

    totals: Totals
    pool: PoolState
    timer: Timer | None
    failure: str = ""

    def on(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """A copy with the tag: vLLM shares one empty output between steps."""
        output = copy(output)
        seconds = 0.0 if self.timer is None else self.timer.seconds()
        output.pie = StepReport(self.totals, self.pool, seconds, self.failure)
        return output


def tagged(output: Any, tag: Tag) -> Any:
    """An output of a step with its tag, now or when it arrives; anything else as it is."""
    if isinstance(output, ModelRunnerOutput):
        return tag.on(output)
    if isinstance(output, AsyncModelRunnerOutput):
        return tagged_class(AsyncModelRunnerOutput)(output, tag.on)
    return output


@cache
def tagged_class(base: type[Any]) -> Any:
    """A subclass of vLLM's ``AsyncModelRunnerOutput`` around another object of it.

    An object around it, not its method replaced: that would be a cycle, and keep its
    tensors until the next collection. All other methods are passed on, also those of
    vLLM 0.33 (``get_kv_connector_output``, v1/outputs.py:366 there).
    """

    def init(self: Any, output: Any, tag: Callable[[Any], Any]) -> None:
        self._output, self._tag = output, tag

    def get_output(self: Any) -> Any:
        return self._tag(self._output.get_output())

    def passed_on(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self._output, name)(*args, **kwargs)

        return method

    others = {name: passed_on(name) for name in base.__abstractmethods__}
    return type("PieAsyncOutput", (base,), {**others, "__init__": init, "get_output": get_output})

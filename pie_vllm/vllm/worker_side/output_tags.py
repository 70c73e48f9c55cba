"""Tags of a step's output: pie's report, completed when the output arrives."""

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
        """Note that the pass has been submitted."""

    def seconds(self) -> float:
        """Seconds that the pass took; called once its output has arrived."""


class HostTimer:
    """The time of the calls, for a device that is the calling thread."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        """Take the time."""
        self._seconds = perf_counter() - self._start

    def seconds(self) -> float:
        """Seconds between the two calls."""
        return self._seconds


class DeviceTimer:
    """The device's own time between two events on the compute stream.

    The calls only submit, so their time is of no use. The device's contains what the stream
    waited for copies, and neither the rest of the step before nor the sampling. Where the device is
    faster than the calls, gaps between kernels count.
    """

    def __init__(self) -> None:
        event: Any = torch.cuda.Event
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._start.record()

    def stop(self) -> None:
        """Record the end's event."""
        self._end.record()

    def seconds(self) -> float:
        """Seconds between the two events; waits for the device if it has not come so far."""
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


class Tag(NamedTuple):
    """What becomes the report of one step once its output has arrived.

    Attributes:
        totals: sums when the step was submitted, so that steps in flight do not mix.
        pool: state of the CPU pool then.
        timer: timer of the forward pass; None if no model ran.
        failure: error text of the step's first failed copy on this rank; empty if none failed.
        elsewhere: gives the error text of a copy that failed on another rank, or waits until all
            have ended the step; None if no other rank takes part.
    """

    totals: Totals
    pool: PoolState
    timer: Timer | None
    failure: str = ""
    elsewhere: Callable[[], str] | None = None

    def on(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """A copy of the output with the report: vLLM shares one empty output between steps."""
        output = copy(output)
        seconds = 0.0 if self.timer is None else self.timer.seconds()
        failure = self.failure
        if not failure and self.elsewhere is not None:
            failure = self.elsewhere()
        output.pie = StepReport(self.totals, self.pool, seconds, failure)
        return output


def tagged(output: Any, tag: Tag) -> Any:
    """The output of a step with its report, now or when it arrives; anything else as it is."""
    if isinstance(output, ModelRunnerOutput):
        return tag.on(output)
    if isinstance(output, AsyncModelRunnerOutput):
        return tagged_class(AsyncModelRunnerOutput)(output, tag.on)
    return output


@cache
def tagged_class(base: type[Any]) -> Any:
    """A subclass of vLLM's ``AsyncModelRunnerOutput`` around another object of it.

    A method replaced on the object itself would be a cycle, and keep the object's tensors until the
    next collection. All other methods are passed on, also those of vLLM 0.33
    (``get_kv_connector_output``, v1/outputs.py:366 there).
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

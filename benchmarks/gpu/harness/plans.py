"""What a short loan of a GPU machine is spent on: stages with limits, one command a call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gpu.harness.process import Options
from benchmarks.gpu.harness.stages import Wanted, parse_stages

CLOSING_SECONDS = 4.0
"""At the end of a call, in which no stage runs any more: results are written and go home."""


DRY_STRETCH = 4
"""Times as long as its limits that a dry run may take."""


class Entry(NamedTuple):
    """Stages that share a limit.

    Attributes:
        stages: stages in the words of the command line.
        limit: seconds of all of them together.
        quick: small sizes.
    """

    stages: str
    limit: float
    quick: bool = False


class Plan(NamedTuple):
    """One call.

    Attributes:
        name: on the command line.
        limit: seconds of the whole command, the build included.
        entries: in the order in which they run.
        question: question that the call answers.
    """

    name: str
    limit: float
    entries: tuple[Entry, ...]
    question: str


PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "first",
            420,
            (
                Entry("memory", 24),
                Entry("facts,aliases:self_test,stream", 55),
                Entry("graphs:engine", 65),
                Entry("copies:real,gather", 65),
                Entry("overlap:ring3", 65),
                Entry("pinning:chunks,beside,tables", 28),
                Entry("aliases:graph", 18),
                Entry("exactness:v2,triton_attn,float32,eager", 95),
            ),
            "Is memory one memory, how fast are copies, what do they cost, and does vLLM start?",
        ),
        Plan(
            "second",
            330,
            (
                Entry("exactness:v2,flash_attn,bfloat16,full,async,control", 145),
                Entry("graphs:full", 165, quick=True),
            ),
            "Are tokens exact with copies inside of FULL graphs, and what do such steps cost?",
        ),
        Plan(
            "fallback",
            330,
            (
                Entry("overlap:ring2,ring4", 120),
                Entry("copies:plans,single", 100),
                Entry("exactness:v2,triton_attn,float32,eager", 95),
            ),
            "Where vLLM failed in the first call: other rings and copies, and one more try of the "
            "setting that was mended.",
        ),
    )
}
"""Calls on one H200 with 15 minutes in all, by name."""


class Job(NamedTuple):
    """One stage to run.

    Attributes:
        wanted: the stage and its parts.
        key: its name among the results.
        options: options of this stage, with the seconds that it may take.
    """

    wanted: Wanted
    key: str
    options: Options


def jobs_of(plan: Plan, options: Options, begin: float) -> Iterator[Job]:
    """The plan's stages one by one; the limit of each is what is left when it is asked for.

    Args:
        plan: stages of the call.
        begin: time at which the call began, by `time.monotonic`.
        options: options of the command. A dry run is always quick, for its figures mean nothing,
            and has more time, for a few cores run what a GPU would.
    """
    dry = options.driver != "cuda"
    stretch = DRY_STRETCH if dry else 1
    call_ends = begin + stretch * plan.limit - CLOSING_SECONDS
    for entry in plan.entries:
        ends = min(call_ends, time.monotonic() + stretch * entry.limit)
        quick = entry.quick or dry
        for wanted in parse_stages(entry.stages):
            left = max(0.0, ends - time.monotonic())
            yield Job(wanted, wanted.text, options._replace(limit=left, quick=quick))

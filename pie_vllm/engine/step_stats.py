"""What the engine reports of a step."""

from __future__ import annotations

from typing import NamedTuple

from pie_vllm.engine.native import StatsStruct


class StepStats(NamedTuple):
    """What one step moved and waited.

    Attributes:
        step: number of the step.
        bytes_loaded: bytes host to device that the step submitted, promotions included.
        bytes_stored: bytes device to host that the step submitted.
        load_seconds: seconds that copies host to device took, of those that
            finished since the last report; with two steps in flight they may
            belong to the step before.
        store_seconds: seconds that copies device to host took, of those that finished since then.
        stall_seconds: seconds that the compute stood at the gates of step
            ``stall_step``; 0 where that is -1.
        gates: layers that passed ``before_attention``.
        copies: runs copied, all layers.
        bytes_promoted: the part of ``bytes_loaded`` that went to resident pages.
        bytes_finished: bytes host to device whose copies took ``load_seconds``.
        stall_step: this step where a wait blocks the calling thread. On an
            asynchronous compute stream one step in four is timed by events, and
            reported with the first step that ends after them; -1 is none.
    """

    step: int
    bytes_loaded: int
    bytes_stored: int
    load_seconds: float
    store_seconds: float
    stall_seconds: float
    gates: int
    copies: int
    bytes_promoted: int = 0
    stall_step: int = -1
    bytes_finished: int = 0


def step_stats(stats: StatsStruct) -> StepStats:
    """The report as the C interface wrote it."""
    return StepStats(*(getattr(stats, name) for name in StepStats._fields))

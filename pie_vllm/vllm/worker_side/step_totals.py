"""Sums over the steps of one rank."""

from __future__ import annotations

from pie_vllm.engine.step_stats import StepStats
from pie_vllm.plan import StepPlan, Totals

UNTIMED_STEPS_MAX = 8
"""Maximum number of steps that the stall of one timed step stands for. The engine times one step
in four on a GPU."""


def with_step(
    totals: Totals, plan: StepPlan, stats: StepStats, *, in_graph: bool = False
) -> Totals:
    """The sums with one more step.

    Args:
        totals: the sums before it.
        plan: plan of the step.
        stats: what the engine counted in it; its stall may be that of an earlier step.
        in_graph: whether the step ran in a FULL graph, copies inside.
    """
    stall = stats.stall_seconds
    if stats.stall_step >= 0:
        stall *= max(1, min(stats.stall_step - totals.stall_step, UNTIMED_STEPS_MAX))
    return Totals(
        steps=totals.steps + 1,
        bytes_loaded=totals.bytes_loaded + stats.bytes_loaded,
        bytes_stored=totals.bytes_stored + stats.bytes_stored,
        load_seconds=totals.load_seconds + stats.load_seconds,
        store_seconds=totals.store_seconds + stats.store_seconds,
        stall_seconds=totals.stall_seconds + stall,
        gates=totals.gates + stats.gates,
        pooled_peak=max(totals.pooled_peak, plan.pooled),
        bytes_finished=totals.bytes_finished + stats.bytes_finished,
        stall_step=totals.stall_step if stats.stall_step < 0 else stats.stall_step,
        step_stall=totals.step_stall if stats.stall_step < 0 else stats.stall_seconds,
        graph_steps=totals.graph_steps + in_graph,
    )

"""Steps of an engine that stages share."""

from __future__ import annotations

from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import NO_RUNS, StepPlan

TIMED_EVERY = 4
"""Among an engine's steps that run the model, the CUDA driver times the copies of every fourth, in
the order of their calls and whatever their numbers (`kSampleEvery` of csrc/engine)."""


def empty_step(engine: TransferEngine, compute_stream: int = 0) -> None:
    """A step that moves nothing; as the engine's first one it is not timed.

    After it the CUDA driver records no events around copies that stages submit by themselves.
    """
    plan = StepPlan(1, NO_RUNS, NO_RUNS, NO_RUNS, (), forward=True)
    engine.begin_step(plan, compute_stream)
    for layer in range(engine.geometry.num_layers):
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    engine.end_step()

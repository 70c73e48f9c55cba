"""Steps of an engine that stages share."""

from __future__ import annotations

from pie_vllm.policy.plan import StepPlan
from pie_vllm.transfer.engine import TransferEngine


def empty_step(engine: TransferEngine, compute_stream: int = 0) -> None:
    """A step that moves nothing, whose number is one that the engine does not time.

    After it the CUDA driver records no events around copies that stages submit by themselves.
    """
    engine.begin_step(StepPlan(1, (), (), (), (), forward=True), compute_stream)
    for layer in range(engine.geometry.num_layers):
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    engine.end_step()

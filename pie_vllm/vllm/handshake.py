"""The workers' sizes and measurements on their way to the scheduler."""

from __future__ import annotations

from typing import Any

from pie_vllm.vllm import settings


def give_geometry_to_scheduler(engine_core: Any, vllm_config: Any) -> None:
    """Ask all workers for their geometry and measurements, once, before the scheduler is made.

    Raises:
        RuntimeError: two ranks chose different sizes.
    """
    if not settings.wants_pie(vllm_config.additional_config):
        return
    found = engine_core.collective_rpc("pie_geometry")
    if any(geometry != found[0] for geometry in found):
        raise RuntimeError(f"ranks disagree about the sizes of the tiers: {found}")
    taken = settings.of(vllm_config)
    taken.geometry = found[0]
    taken.prior = min(engine_core.collective_rpc("pie_prior"), key=lambda p: p.bandwidth or 0.0)

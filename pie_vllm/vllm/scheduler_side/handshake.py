"""What the scheduler is told outside of steps: the workers' sizes, and changes of weights."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from pie_vllm.vllm import args, refusals, settings


def check_classes(vllm_config: Any) -> None:
    """Refuse an engine whose scheduler or workers another plugin has replaced, before it starts.

    Args:
        vllm_config: vLLM's finished configuration.

    Raises:
        UnsupportedError: the scheduler or worker class is not pie's; names the class found.
    """
    if settings.wants_pie(vllm_config.additional_config):
        worker = args.worker_class(args.device_of(current_platform))
        refusals.check_classes(vllm_config, args.SCHEDULER, worker)


def give_geometry_to_scheduler(engine_core: Any, vllm_config: Any) -> None:
    """Ask all workers for their geometry and measurements, once, before the scheduler is made.

    The prior with the slowest link is kept, because a step waits for the slowest rank.

    Args:
        engine_core: vLLM's engine core, whose workers have sized the tiers.
        vllm_config: vLLM's finished configuration; its pie settings receive both.

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


def _stale_kv(engine_core: Any) -> Any:
    """The scheduler's guard against stale KV; None without pie or before there is a scheduler."""
    return getattr(getattr(engine_core, "scheduler", None), "pie_stale", None)


def forget_kv_of_old_weights(engine_core: Any) -> None:
    """Forget all cached KV after a change of weights: no later request may find it."""
    stale = _stale_kv(engine_core)
    if stale is not None:
        stale.new_weights()


def adapter_added(engine_core: Any, lora_request: Any) -> None:
    """Forget the KV of an adapter that was reloaded."""
    stale = _stale_kv(engine_core)
    if stale is not None:
        stale.adapter_added(lora_request)


def adapter_removed(engine_core: Any, lora_id: int) -> None:
    """Forget the KV of an adapter that was removed."""
    stale = _stale_kv(engine_core)
    if stale is not None:
        stale.adapter_removed(lora_id)

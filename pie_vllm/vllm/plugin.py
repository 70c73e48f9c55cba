"""Entry point of ``vllm.general_plugins``: called in every vLLM process."""

from __future__ import annotations


def register() -> None:
    """Add ``--block-manager`` and the ``--pie-*`` flags to vLLM; twice is once."""
    from pie_vllm.vllm import args, compat, compat_weights, handshake, prometheus

    args.install()
    compat.after_kv_caches(handshake.give_geometry_to_scheduler)
    compat_weights.after_new_weights(handshake.forget_kv_of_old_weights)
    compat_weights.after_new_adapter("add_lora", handshake.adapter_added)
    compat_weights.after_new_adapter("remove_lora", handshake.adapter_removed)
    compat.with_prometheus_logger(prometheus.extend)

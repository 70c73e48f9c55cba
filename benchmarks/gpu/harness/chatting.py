"""Chats that arrive by themselves or come back, on an engine in this process: times and KV."""

from __future__ import annotations

from typing import Any

from benchmarks.real.parking_run import serve

FIGURES = (
    *("tok_s", "requests_s", "seconds", "ttft_p50_ms", "ttft_p99_ms", "latency_p99_s"),
    *("prefill_tokens", "prompt_tokens", "recomputed_tokens", "preemptions"),
)
TIERS = ("hit_device", "hit_pooled", "hit_cpu")
"""Tokens found in the prefix cache: in device memory, pooled, parked or offloaded."""

MOVED = ("bytes_stored", "bytes_loaded", "bytes_restored")
"""Between the device and CPU memory. Restored are those loaded to stay on the device."""


def serve_chats(llm: Any, load: dict[str, Any], with_pie: bool) -> dict[str, Any]:
    """Serve a load, as `parking_run` does; FIGURES of it, TIERS and MOVED."""
    before = _counts(llm, with_pie)
    found = serve(llm, load)
    after = _counts(llm, with_pie)
    return {key: found[key] for key in FIGURES} | {key: after[key] - before[key] for key in after}


def _counts(llm: Any, with_pie: bool) -> dict[str, float]:
    """TIERS and MOVED since the engine's start."""
    told: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if value is not None:
            told[metric.name] = told.get(metric.name, 0) + value

    def of(*names: str) -> list[float]:
        return [told.get(f"vllm:{name}", 0) for name in names]

    if not with_pie:
        device, cpu = of("prefix_cache_hits", "external_prefix_cache_hits")
        stored, loaded = of("kv_offload_store_bytes", "kv_offload_load_bytes")
        return dict(zip((*TIERS, *MOVED), (device, 0, cpu, stored, loaded, loaded), strict=True))
    from pie_vllm.vllm import counters

    pie = counters(llm)
    block = pie["page_bytes"] * pie["num_layers"]
    tokens = llm.llm_engine.vllm_config.cache_config.block_size
    hits = [n * tokens for n in of("pie_resident_hits", "pie_pooled_hits", "pie_parked_hits")]
    (restored,) = of("pie_restored_blocks")
    moved = (pie["bytes_stored"], pie["bytes_loaded"], restored * block)
    return dict(zip((*TIERS, *MOVED), (*hits, *moved), strict=True))

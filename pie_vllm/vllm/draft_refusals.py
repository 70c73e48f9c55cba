"""Refusals of drafters whose layers pie does not know how to keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pie_vllm.vllm.refusals import WITH_DRAFT_LAYERS, refuse


def check_drafter(config: Any) -> None:
    """Refuse a drafter of another kind than those that were tested, of methods that are.

    Args:
        config: vLLM's VllmConfig, finished, with speculation by a drafter that has KV.

    Raises:
        UnsupportedError: names the method, and the kind of its model.
    """
    speculative = config.speculative_config
    if speculative is None or not speculative.uses_draft_kv_cache():
        return
    for found, what, why in (
        (
            speculative.use_gemma4_mtp(),
            "speculative decoding by Gemma 4's MTP layers",
            "they read the ring slots of the model's own layers, after these have moved on",
        ),
        (
            speculative.use_step3p5_mtp(),
            "speculative decoding by Step 3.5's MTP layers",
            "they are in several KV cache groups",
        ),
        (
            speculative.use_multi_module_mtp(),
            f"{speculative.num_speculative_tokens} draft tokens by several MTP modules",
            "these write the KV of accepted tokens again, which was not tested",
        ),
        (
            bool(speculative.parallel_drafting),
            "parallel drafting",
            "what its masked tokens leave in a block was not tested",
        ),
    ):
        if found:
            raise refuse(
                f"{what} (--speculative-config)",
                why,
                f"Set its method to one of {', '.join(WITH_DRAFT_LAYERS)} with a plain drafter, or "
                "remove --speculative-config",
            )


def check_groups(groups: Sequence[Any], drafts: Collection[str]) -> None:
    """Refuse a drafter whose layers cannot lie in the model's own KV cache groups.

    Args:
        groups: vLLM's KVCacheGroupSpecs.
        drafts: names of the drafter's layers.

    Raises:
        UnsupportedError: names a layer, with the sizes of its KV and of the model's.
    """
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    if not drafts:
        return
    for group in groups:
        if type(group.kv_cache_spec) is UniformTypeKVCacheSpecs:
            _check_pages(group.kv_cache_spec.kv_cache_specs, drafts)


def _check_pages(specs: Mapping[str, Any], drafts: Collection[str]) -> None:
    pages = {name: spec.page_size_bytes for name, spec in specs.items()}
    own = {size for name, size in pages.items() if name not in drafts}
    for name in sorted(set(pages) & set(drafts)):
        if pages[name] not in own:
            raise refuse(
                f"a drafter (--speculative-config) whose layer {name} has KV pages of "
                f"{pages[name]} bytes beside the model's of {sorted(own)}",
                "the pages of a block must have one size",
                "Choose a drafter with the model's number of KV heads, head size and type, or "
                "remove --speculative-config",
            )

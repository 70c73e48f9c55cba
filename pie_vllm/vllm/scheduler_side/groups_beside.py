"""Groups of layers without a pool, as the policy sees vLLM's managers of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pie_vllm.geometry import cdiv
from pie_vllm.policy.placement.interfaces import GroupBeside
from pie_vllm.vllm.compat import engine_core
from pie_vllm.vllm.kv_groups import KvGroups


def groups_beside(managers: Sequence[Any], groups: KvGroups) -> list[GroupBeside]:
    """The groups without a pool.

    Args:
        managers: vLLM's manager of each group.
        groups: which one is pooled.
    """
    if groups.others:
        engine_core.check_computed_elsewhere()
    if any(map(_moves, managers)):
        engine_core.check_states()
    return [
        GroupBeside(number, managers[number].req_to_blocks, needed_by(managers[number]))
        for number in groups.others
    ]


def needed_by(manager: Any) -> Callable[[int], range]:
    """Gives the places of the blocks that a request needs after so many tokens.

    As ``allocate_external_computed_blocks`` of vLLM's managers counts them,
    v1/core/single_type_kv_cache_manager.py:326 in 0.32: of a window those that it reaches back to,
    of a state its last one, where vLLM's runners look for it (``engine_core.check_states``).
    """
    size: int = manager.block_size
    skipped: Callable[[int], int] = manager.get_num_skipped_tokens

    def needed(tokens: int) -> range:
        return range(max(skipped(tokens), 0) // size, cdiv(tokens, size))

    return needed


def new_residents(
    coordinator: Any,
    others: Sequence[int],
    request: Any,
    found: Sequence[Sequence[Any]],
    hit: int,
    tokens: int,
    lookahead: int = 0,
) -> list[int]:
    """Residents that a request takes in each group without a pool for so many of its tokens.

    As vLLM counts them, v1/core/kv_cache_coordinator.py:190 in 0.32, but for a state that comes
    from elsewhere: of the block that it comes in and the one that it moves to vLLM counts one, and
    takes both (``engine_core.check_states``).

    Args:
        coordinator: vLLM's, of the managers of all groups.
        others: indices of these groups.
        request: that is to be admitted.
        found: its blocks in the prefix cache, by group.
        hit: tokens that it does not compute, beyond those whose blocks it has.
        tokens: up to the end of the step, or of the request.
        lookahead: tokens behind these for which it gets slots, too.
    """
    computed = request.num_computed_tokens + hit
    prefill_end = max(request.num_prompt_tokens, request.num_tokens - 1)
    if coordinator.retention_interval != 0:
        prefill_end = 0  # Each chunk may leave a state within it.
    counts = []
    for group in others:
        manager, blocks = coordinator.single_type_managers[group], found[group]
        count = manager.get_num_blocks_to_allocate(
            request.request_id,
            tokens + lookahead,
            blocks,
            computed,
            computed,
            tokens,
            prefill_end=prefill_end,
        )
        has_none = not (blocks or manager.req_to_blocks.get(request.request_id))
        if _moves(manager) and computed and has_none:
            size = manager.block_size
            count += cdiv(tokens, size) > cdiv(computed, size)
        counts.append(count)
    return counts


def _moves(manager: Any) -> bool:
    """Whether a manager's group has states that move from block to block."""
    return getattr(manager, "mamba_cache_mode", "none") == "align"

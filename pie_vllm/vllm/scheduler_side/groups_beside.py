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
    return [
        GroupBeside(number, managers[number].req_to_blocks, needed_by(managers[number]))
        for number in groups.others
    ]


def needed_by(manager: Any) -> Callable[[int], range]:
    """Gives the places of the blocks that a request needs after so many tokens.

    As ``allocate_external_computed_blocks`` of vLLM's managers counts them,
    v1/core/single_type_kv_cache_manager.py:326 in 0.32: of a window those that it reaches back to,
    of a state its last one.
    """
    size: int = manager.block_size
    skipped: Callable[[int], int] = manager.get_num_skipped_tokens

    def needed(tokens: int) -> range:
        return range(max(skipped(tokens), 0) // size, cdiv(tokens, size))

    return needed

"""Groups of layers without a pool, and states that move from block to block.

vLLM keeps states so with prefix caching: ``mamba_cache_mode`` "align".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.v1.kv_cache_interface import MambaSpec

StateSlot = tuple[int, int]
"""Block, and number of tokens after which it holds the state."""


def aligned(make: Callable[..., Any], block_size: int, checkpoints: bool) -> Callable[..., Any]:
    """A maker of schedulers whose states move from block to block where there is a prefix cache.

    Args:
        make: as vLLM calls it.
        block_size: tokens of a block, the same in all groups.
        checkpoints: whether the last chunk of a prompt also leaves the state at the last end of a
            block within it, as Mamba 2 does.
    """

    size = block_size

    def made(
        *,
        vllm_config: Any,
        kv_cache_config: Any,
        block_size: int,
        hash_block_size: int,
        **more: Any,
    ) -> Any:
        cache = vllm_config.cache_config
        groups = kv_cache_config.kv_cache_groups
        states = any(isinstance(group.kv_cache_spec, MambaSpec) for group in groups)
        if states and cache.enable_prefix_caching:
            cache.mamba_cache_mode, cache.mamba_block_size = "align", size
            groups = [
                replace(group, kv_cache_spec=_aligned(group.kv_cache_spec, size, checkpoints))
                for group in groups
            ]
            kv_cache_config = replace(
                kv_cache_config,
                kv_cache_groups=groups,
                prefix_cache_retention_interval=cache.prefix_cache_retention_interval,
            )
            block_size = hash_block_size = size
        return make(
            vllm_config=vllm_config,
            kv_cache_config=kv_cache_config,
            block_size=block_size,
            hash_block_size=hash_block_size,
            **more,
        )

    return made


def _aligned(spec: Any, block_size: int, checkpoints: bool) -> Any:
    if not isinstance(spec, MambaSpec):
        return spec
    return replace(
        spec,
        block_size=block_size,
        mamba_cache_mode="align",
        num_prefill_checkpoint_blocks=int(checkpoints),
        prefill_checkpoint_alignment=1 if checkpoints else None,
    )


def state_slots(
    table: Sequence[int], start: int, end: int, block_size: int, checkpoints: bool
) -> tuple[list[StateSlot], list[StateSlot]]:
    """Where a step that computes tokens ``start`` to ``end`` finds a state, and leaves states.

    As vLLM's runners do, ``preprocess_mamba``, v1/worker/mamba_utils.py:1446 in 0.32: the state is
    in the block of its last token.
    """
    before = [(table[(start - 1) // block_size], start)] if start else []
    after = [(table[(end - 1) // block_size], end)]
    assert all(block for block, _ in (*before, *after)), "a state's block is not there"
    if checkpoints:
        offsets, columns = compute_mamba_prefill_checkpoints(
            [end],
            [end - start],
            hash_block_size=block_size,
            mamba_block_size=block_size,
            checkpoint_alignment=1,
            drop_eagle_block=False,
            cache_hit_alignment_tokens=block_size,
        )
        if offsets[0] and table[columns[0]]:
            after.append((table[columns[0]], start + offsets[0]))
    return before, after


class Group(NamedTuple):
    """A group of layers without a pool.

    Attributes:
        number: index among the model's groups.
        window: tokens that it reads, the newest one included; 0 for a state.
        aligned: whether its states move from block to block.
        checkpoints: whether they are left at ends of blocks within a step, too.
    """

    number: int
    window: int
    aligned: bool = False
    checkpoints: bool = False

    def state_slots(
        self, table: Sequence[int], start: int, end: int, block_size: int
    ) -> tuple[list[StateSlot], list[StateSlot]]:
        """Where a step finds a state, and where it leaves states."""
        if self.aligned:
            return state_slots(table, start, end, block_size, self.checkpoints)
        return [(table[0], start)] if start else [], [(table[0], end)]


def groups_beside(
    beside: Sequence[int] = (),
    enable_prefix_caching: bool = True,
    checkpoints: bool = False,
    **_: Any,
) -> list[Group]:
    """The groups without a pool, by the options of a scheduler."""
    return [
        Group(index, window, enable_prefix_caching, checkpoints)
        for index, window in enumerate(beside)
    ]

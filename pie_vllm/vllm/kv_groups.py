"""vLLM's groups of layers: which one is pooled, and what the others hold beside it.

Layers of a group share a block table. All groups take their blocks from one set of ids, and a
block belongs to one group at a time. Blocks of full attention are pooled; windows, chunks and
states live on the device, where a request holds a bounded number of their blocks. Layers of a
drafter that are in the pooled group keep their pages of all blocks on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pie_vllm.errors import ConfigError
from pie_vllm.geometry import cdiv
from pie_vllm.vllm import layer_refusals

TAIL_BLOCKS = 2
"""Number of resident blocks that a request needs of the pooled group: one that is being written,
and the one after it."""


class KvGroups(NamedTuple):
    """A model's groups, one of which is pooled.

    Attributes:
        pooled: index of the pooled group.
        layers: names of its layers that pass the ring, in the order in which the model runs them.
        page_bytes: bytes of a block in one layer, equal in all groups.
        block_size: tokens of a block of the pooled group.
        regions: number of layers of the largest group; their pages do not overlap.
        others: indices of the other groups.
        residents: number of blocks that one request holds at once in the other groups, at most.
        residents_min: the same where a step computes one block of its prompt, of each of these
            groups.
        cost: number of residents that a block of a prompt takes in all groups.
        parks: whether rows of the pool can hold what a request has in the other groups: all pages
            of a block, and a state that is one block.
        drafts: names of its layers that a drafter runs, after all others.
    """

    pooled: int
    layers: tuple[str, ...]
    page_bytes: int
    block_size: int
    regions: int
    others: tuple[int, ...] = ()
    residents: int = 0
    residents_min: tuple[int, ...] = ()
    cost: int = 1
    parks: bool = True
    drafts: tuple[str, ...] = ()

    @property
    def extra_regions(self) -> int:
        """Number of regions that no layer of the pooled group has."""
        return self.regions - len(self.layers) - len(self.drafts)

    @property
    def resident_min(self) -> int:
        """Number of residents without which a request cannot run; 0 without other groups."""
        return sum(self.residents_min) + TAIL_BLOCKS if self.others else 0

    def check(self, resident_blocks: int) -> None:
        """Refuse a device that does not hold what a request needs of the other groups.

        Args:
            resident_blocks: number of resident blocks, the null block included.

        Raises:
            ConfigError: says how many there are and how many are needed.
        """
        if resident_blocks <= self.resident_min:
            raise ConfigError(
                f"{len(self.others)} of the model's {len(self.others) + 1} KV cache groups keep "
                f"sliding windows, chunks or states, which are not pooled: one request needs "
                f"{self.resident_min} blocks of {self.regions * self.page_bytes} bytes in device "
                f"memory, and {resident_blocks - 1} are all that fit there. Raise "
                "--kv-cache-memory-bytes or --gpu-memory-utilization, lower --max-model-len or "
                '--block-size, or lower additional_config["pie"]["ring_fraction"].'
            )

    def pooled_share(self, max_model_len: int) -> float:
        """Share of the KV blocks of a request of so many tokens that can be pooled."""
        own = cdiv(max_model_len, self.block_size)
        return own / (own + self.residents)


def groups_of(
    groups: Sequence[Any],
    specs: Mapping[str, Any] | None,
    vllm_config: Any,
    drafts: Collection[str] = (),
) -> KvGroups:
    """The pooled group among vLLM's groups, and what the others need.

    Args:
        groups: vLLM's KVCacheGroupSpecs.
        specs: specs by layer, in the order in which the model runs them; None keeps the order that
            the group has.
        vllm_config: the finished configuration.
        drafts: names of layers that a drafter runs.

    Raises:
        UnsupportedError: names a layer that cannot be pooled, or lie beside pooled ones.
    """
    pooled = layer_refusals.check_groups(groups)
    layer_refusals.check_states(groups, vllm_config.speculative_config)
    own = groups[pooled]
    names = own.layer_names if specs is None else [n for n in specs if n in set(own.layer_names)]
    spec = own.kv_cache_spec
    others = tuple(index for index in range(len(groups)) if index != pooled)
    beside = [groups[index].kv_cache_spec for index in others]
    size = spec.block_size
    most = vllm_config.model_config.max_model_len
    regions = max(len(group.layer_names) for group in groups)
    return KvGroups(
        pooled,
        tuple(name for name in names if name not in drafts),
        spec.page_size_bytes,
        size,
        regions,
        others,
        sum(_blocks_at_once(s, vllm_config) for s in beside),
        tuple(_blocks_of_chunk(s, vllm_config, min(size, most)) for s in beside),
        1 + sum(_grows(s, vllm_config) * cdiv(size, s.block_size) for s in beside),
        regions == len(names) and all(map(_one_block, beside)),
        tuple(name for name in names if name in drafts),
    )


def _blocks_at_once(spec: Any, vllm_config: Any) -> int:
    """Blocks that one request holds in a group at once, as vLLM counts them at start."""
    return cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)


def _blocks_of_chunk(spec: Any, vllm_config: Any, tokens: int) -> int:
    """The same where so many tokens of a prompt are in flight.

    Relies on ``max_admission_blocks_per_request`` of windows and chunks,
    v1/kv_cache_interface.py:813 and :859 in 0.32.
    """
    bounded = getattr(spec, "max_admission_blocks_per_request", None)
    if bounded is None:
        return _blocks_at_once(spec, vllm_config)
    steps = max(1, int(vllm_config.max_concurrent_batches))
    found: int = bounded(
        max_in_flight_tokens=steps * tokens, max_model_len=vllm_config.model_config.max_model_len
    )
    return found


def _one_block(spec: Any) -> bool:
    """Whether what a request has in a group after a step is a window, or a state in one block.

    With prefix caching a state moves from block to block, and the newest one is in the block of the
    last token (``groups_beside.needed_by``).
    """
    return not hasattr(spec, "mamba_type") or not spec.num_speculative_blocks


def _grows(spec: Any, vllm_config: Any) -> bool:
    """Whether each block of a prompt takes blocks of the group, until they leave its window."""
    if hasattr(spec, "mamba_type"):
        return bool(vllm_config.cache_config.mamba_cache_mode != "none")
    return True

"""Sizes of everything, from the model, the device bytes and the pool bytes.

Words (``p`` page bytes, ``L`` layers, ``R`` resident blocks, ``W`` pooled
blocks, ``B`` ring slots, ``g`` mapping granularity):

* a *block* is vLLM's KV cache block; its *page* in one layer has ``p`` bytes;
* ids ``[0, R)`` are resident, ids ``[R, R + W)`` are pooled;
* layer ``l`` owns ``R`` pages and sees ``W`` pages of ring slot ``l mod B``;
* a *row* is the CPU copy of one block: ``L`` pages.

The address range of layer ``l`` begins at ``l * layer_stride``::

    | shift | R resident pages | W pooled pages (ring slot l mod B) | padding |
            ^ block 0          ^ multiple of g                                ^ multiple of g

``shift = (-R * p) mod g`` puts the resident/pooled boundary of every layer on
a multiple of ``g`` for any page size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pie_vllm.errors import ConfigError

DEFAULT_RING_SLOTS = 3
"""One slot being read, one ready, one being filled: B = 2 hides a copy only if
it never takes longer than the layer before it."""

MOST_RING_FRACTION = 0.15
"""Of the device's KV bytes, for a ring whose width follows the link. It is there for devices of a
few blocks: with thousands of blocks a link feeds some percent at most."""

UNKNOWN_LINK_FRACTION = 0.05
"""The same, for a link that could not be measured."""

CHUNK_BYTES = 64 << 20
"""Aim for the size of a chunk of the host pool; a chunk holds whole rows."""

PAGE_TABLE_SHARE = 512
"""Bytes of the CPU pool for which a CUDA device may take one byte of its own memory: an entry of
8 bytes in the device's page tables for each page of 4 KiB that is registered. Larger pages take
less, so it is the most; not measured yet."""

MIN_RESIDENT_BLOCKS = 4
"""Null block, a tail that is being written, the block after it, one spare."""

MOST_BYTES = 2**63 - 1
"""Of any size: the native engine counts in 64 bits."""


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def page_table_bytes(pool_bytes: int) -> int:
    """Device memory that the page tables of a pool of so many bytes may take on CUDA."""
    return cdiv(pool_bytes, PAGE_TABLE_SHARE)


def check_device_bytes(left: int, tables: int, pool_bytes: int) -> int:
    """The device bytes that are left for KV beside the pool's page tables.

    Raises:
        ConfigError: there are none.
    """
    if left > 0:
        return left
    raise ConfigError(
        f"--pie-pool-gib {pool_bytes / 2**30:.3f} is too large for the device: page tables of such "
        f"a pool may take {tables / 2**20:.1f} MiB of its memory, and "
        f"{(left + tables) / 2**20:.1f} MiB are there for KV. Lower --pie-pool-gib, or raise "
        "--gpu-memory-utilization or --kv-cache-memory-bytes."
    )


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` for positive integers."""
    return -(-a // b)


def blocks_fed(link_bytes_per_s: float, step_seconds: float, row_bytes: int) -> int:
    """Pooled blocks that a link can make use of: ``ceil(link * step / row_bytes)``.

    What one step brings: in the simulator (60 random machines and loads with links of 0.1 to
    400 GB/s, 2026-11-22) windows of half of it to twice of it are within 2 % of the best in the
    mean, and wider ones cost more residents than they give.

    Args:
        link_bytes_per_s: from the CPU to the device.
        step_seconds: of a step that decodes, attention left out.
        row_bytes: of one block in all layers.
    """
    return max(1, math.ceil(link_bytes_per_s * step_seconds / row_bytes))


@dataclass(frozen=True)
class Geometry:
    """All sizes that scheduler, workers and engine share.

    Attributes:
        num_layers: ``L``, attention layers with KV.
        page_bytes: ``p``, bytes of one block in one layer.
        resident_blocks: ``R``, with vLLM's null block (id 0).
        pooled_blocks: ``W``, ids that can be in use at once.
        ring_slots: ``B``.
        rows: blocks that the CPU pool holds, at least ``W``.
        chunk_rows: rows of one chunk; no run of rows crosses a chunk.
        granularity: ``g``, bytes; what the driver maps in one piece.
    """

    num_layers: int
    page_bytes: int
    resident_blocks: int
    pooled_blocks: int
    ring_slots: int
    rows: int
    chunk_rows: int
    granularity: int

    @property
    def num_blocks(self) -> int:
        """``R + W``, what vLLM's block pool counts."""
        return self.resident_blocks + self.pooled_blocks

    @property
    def row_bytes(self) -> int:
        """``L * p``: one block over all layers."""
        return self.num_layers * self.page_bytes

    @property
    def shift(self) -> int:
        """Bytes before block 0 of a layer; vLLM's ``KVCacheTensor.offset``."""
        return -self.resident_blocks * self.page_bytes % self.granularity

    @property
    def layer_resident_bytes(self) -> int:
        """Bytes mapped for one layer's own pages; a multiple of ``g``."""
        return self.shift + self.resident_blocks * self.page_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one ring slot: ``W * p`` rounded up to ``g``."""
        return round_up(self.pooled_blocks * self.page_bytes, self.granularity)

    @property
    def layer_stride(self) -> int:
        """Bytes from one layer to the next in the arena's address range."""
        return self.layer_resident_bytes + self.slot_bytes

    @property
    def virtual_bytes(self) -> int:
        """Bytes of address space of the arena; aliases counted once a layer."""
        return self.num_layers * self.layer_stride

    @property
    def ring_bytes(self) -> int:
        """Device bytes of the ring, paid also while nothing is pooled."""
        return self.ring_slots * self.slot_bytes

    @property
    def device_bytes(self) -> int:
        """Device bytes in all: ``L * (shift + R * p) + B * slot_bytes``."""
        return self.num_layers * self.layer_resident_bytes + self.ring_bytes

    @property
    def num_chunks(self) -> int:
        """Chunks of the host pool; the last one may be smaller."""
        return cdiv(self.rows, self.chunk_rows) if self.rows else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of CPU memory that the pool's rows take."""
        return self.rows * self.row_bytes

    def bytes_of_chunks(self, chunks: int) -> int:
        """CPU bytes of the first ``chunks`` chunks of the pool."""
        return min(chunks * self.chunk_rows, self.rows) * self.row_bytes

    @property
    def idle_cost_blocks(self) -> float:
        """Resident blocks that the ring's bytes would have held."""
        return self.ring_bytes / self.row_bytes

    @property
    def capacity_gained_blocks(self) -> int:
        """Blocks of both tiers beyond those that the device's bytes alone would hold."""
        return self.num_blocks - self.device_bytes // self.row_bytes

    def page_offset(self, layer: int, block: int) -> int:
        """Byte offset of a page in the arena's address range."""
        return layer * self.layer_stride + self.shift + block * self.page_bytes


def _device_bytes(layers: int, page: int, r: int, w: int, slots: int, g: int) -> int:
    return layers * round_up(r * page, g) + slots * round_up(w * page, g)


def _most_resident(layers: int, page: int, w: int, slots: int, g: int, budget: int) -> int:
    """The largest R whose bytes, with W pooled blocks' ring, fit the budget."""
    left = budget - slots * round_up(w * page, g)
    return max(0, (left // layers) // g * g // page)


def plan_geometry(
    *,
    num_layers: int,
    page_bytes: int,
    device_bytes: int,
    pool_bytes: int,
    granularity: int,
    needed_blocks: int,
    ring_slots: int | None = None,
    ring_fraction: float | None = None,
    fed_blocks: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    whole_blocks: int = 0,
) -> Geometry:
    """Divide ``device_bytes`` into resident pages and a ring.

    ``rows = pool_bytes // (L * p)``. The window is ``W = min(rows,
    ring_fraction * device_bytes // (B * p))``, without a given fraction also
    at most ``fed_blocks``; where ``R + W`` would then be below
    ``needed_blocks``, ``W`` grows to the least value that reaches it.
    ``R`` is what the rest of the device bytes holds:
    ``L * roundup(R * p, g) + B * roundup(W * p, g) <= device_bytes``. Where
    that is not above ``whole_blocks``, ``W`` shrinks as far as it takes, and
    where that cannot be, the caller finds fewer residents than it asked for.

    Args:
        num_layers: attention layers with KV, at least 1.
        page_bytes: bytes of one block in one layer.
        device_bytes: device memory for KV, ring included.
        pool_bytes: CPU memory for KV, in all.
        granularity: bytes that the driver maps in one piece.
        needed_blocks: blocks of one request of ``max_model_len`` tokens.
        ring_slots: ``B``; ``None`` takes ``min(3, L)``.
        ring_fraction: share of ``device_bytes`` that the ring may take; ``None`` is
            ``MOST_RING_FRACTION`` with ``fed_blocks``.
        fed_blocks: what the link can make use of; see ``blocks_fed``.
        chunk_bytes: aim for the size of one chunk of the pool.
        whole_blocks: blocks that one step must be able to write, all of them resident.

    Raises:
        ConfigError: the sizes cannot work; says the least that would.
    """
    _check_sizes(
        {
            "the number of attention layers": num_layers,
            "the bytes of a KV page": page_bytes,
            "the driver's granularity": granularity,
            "the blocks of a longest request (--max-model-len)": needed_blocks,
            "the bytes of a chunk": chunk_bytes,
            "the device's KV memory (--kv-cache-memory-bytes)": device_bytes,
            "the pool (--pie-pool-gib)": pool_bytes,
        },
        ring_fraction,
        fed_blocks,
    )
    slots = min(DEFAULT_RING_SLOTS, num_layers) if ring_slots is None else ring_slots
    if not 1 <= slots <= num_layers:
        raise ConfigError(
            f"--pie-ring-slots {slots} is not possible: the model has {num_layers} attention "
            f"layers. Use a value from 1 to {num_layers} (2 or more to copy ahead)."
        )
    row_bytes = num_layers * page_bytes
    rows = pool_bytes // row_bytes
    if rows < 1:
        raise ConfigError(
            f"--pie-pool-gib is too small: {pool_bytes} bytes hold no block. One block of this "
            f"model takes {row_bytes} bytes in all layers; give at least "
            f"{row_bytes / 2**30:.6f} GiB."
        )
    need = needed_blocks + 1  # vLLM's null block takes one id.
    share = MOST_RING_FRACTION if ring_fraction is None else ring_fraction
    window = min(rows, int(share * device_bytes) // (slots * page_bytes))
    if ring_fraction is None and fed_blocks is not None:
        window = min(window, fed_blocks)
    sizes = (num_layers, page_bytes)
    resident = _most_resident(*sizes, window, slots, granularity, device_bytes)
    if resident + window < need or window < 1:
        window, resident = _widen(
            need, max(window, 1), rows, num_layers, page_bytes, slots, granularity, device_bytes
        )
    if resident <= whole_blocks:
        window, resident = _narrow(
            whole_blocks + 1, need, window, num_layers, page_bytes, slots, granularity, device_bytes
        )
    if resident < MIN_RESIDENT_BLOCKS:
        least = _device_bytes(*sizes, MIN_RESIDENT_BLOCKS, window, slots, granularity)
        raise ConfigError(
            f"the device's KV memory of {device_bytes} bytes is too small for a ring of {slots} "
            f"slots x {window} pooled blocks and {MIN_RESIDENT_BLOCKS} resident blocks of "
            f"{page_bytes} bytes a layer: {least} bytes are needed. Raise "
            "--kv-cache-memory-bytes or --gpu-memory-utilization, or lower --max-model-len, "
            "--pie-ring-slots or --block-size."
        )
    if resident + window < need:
        missing = (need - resident - window) * row_bytes
        raise ConfigError(
            f"one request of --max-model-len needs {need} blocks, but {resident} resident and "
            f"{window} pooled blocks (pool of {rows} rows) are all that fit. Raise "
            f"--pie-pool-gib by at least {missing / 2**30:.3f} GiB, raise the device's KV memory, "
            "or lower --max-model-len."
        )
    chunk_rows = max(1, min(rows, chunk_bytes // row_bytes))
    geometry = Geometry(
        num_layers=num_layers,
        page_bytes=page_bytes,
        resident_blocks=resident,
        pooled_blocks=window,
        ring_slots=slots,
        rows=rows,
        chunk_rows=chunk_rows,
        granularity=granularity,
    )
    if geometry.virtual_bytes > MOST_BYTES:
        raise ConfigError(
            f"{window} pooled blocks in each of {num_layers} layers take {geometry.virtual_bytes} "
            f"bytes of addresses; {MOST_BYTES} are there. Lower --pie-pool-gib or "
            "--pie-ring-fraction."
        )
    return geometry


def _check_sizes(
    sizes: dict[str, int], ring_fraction: float | None, fed_blocks: int | None
) -> None:
    """Refuse sizes that no machine has: their products would not be what they seem."""
    for name, value in sizes.items():
        least = 0 if "--pie-pool-gib" in name or "--kv-cache-memory-bytes" in name else 1
        if not least <= value <= MOST_BYTES:
            raise ConfigError(f"{name} cannot be {value}; {least} to {MOST_BYTES} can be.")
    if ring_fraction is not None and not 0 < ring_fraction < 1:
        raise ConfigError(
            f"--pie-ring-fraction {ring_fraction} is not a share; use one above 0 and below 1."
        )
    if fed_blocks is not None and fed_blocks < 0:
        raise ConfigError(f"a link cannot feed {fed_blocks} blocks; measure it again.")


def _widen(
    need: int,
    window: int,
    rows: int,
    num_layers: int,
    page_bytes: int,
    slots: int,
    granularity: int,
    device_bytes: int,
) -> tuple[int, int]:
    """The least W (and its R) with ``R + W >= need``, else the W that comes nearest.

    A further pooled block costs ``B`` pages and a resident one ``L >= B``, so
    ``R + W`` does not fall as W grows, up to rounding; bisection finds the edge.
    """

    def resident(w: int) -> int:
        return _most_resident(num_layers, page_bytes, w, slots, granularity, device_bytes)

    low, high = window, rows
    while low < high and resident(high) < MIN_RESIDENT_BLOCKS:
        high = (low + high) // 2
    while low < high:
        middle = (low + high) // 2
        if resident(middle) + middle >= need:
            high = middle
        else:
            low = middle + 1
    return low, resident(low)


def _narrow(
    wanted: int,
    need: int,
    window: int,
    num_layers: int,
    page_bytes: int,
    slots: int,
    granularity: int,
    device_bytes: int,
) -> tuple[int, int]:
    """The largest W (and its R) up to ``window`` with ``R >= wanted``, else the least W.

    As far as ``R + W >= need``; bisection, since R does not grow with W.
    """

    def resident(w: int) -> int:
        return _most_resident(num_layers, page_bytes, w, slots, granularity, device_bytes)

    low, high = 1, window
    while low < high:
        middle = (low + high + 1) // 2
        if resident(middle) >= wanted:
            low = middle
        else:
            high = middle - 1
    if resident(low) + low < need:
        return window, resident(window)
    return low, resident(low)

"""Sizes of the resident pages, the ring and the pool.

Words (``p`` page bytes, ``L`` layers with a pool, ``N`` regions, ``R`` resident blocks, ``W``
pooled blocks, ``B`` ring slots, ``g`` mapping granularity):

* a *block* is vLLM's KV cache block; its *page* in one layer has ``p`` bytes;
* ids ``[0, R)`` are resident, ids ``[R, R + W)`` are pooled;
* layer ``l`` owns ``R`` pages and sees ``W`` pages of ring slot ``l mod B``;
* a *draft layer* runs after all of these, passes no gate and has ``R + W`` pages of its own; there
  are ``D``;
* a *row* is the CPU copy of one block: ``L + D`` pages;
* a *region* is the address range of one layer. vLLM puts the ``i``-th layer of every group of
  layers in region ``i``. The layers with a pool have the first ``L`` of ``N``, draft layers the
  next ``D``; in the others only layers of groups without a pool have pages, and these use resident
  ids alone.

The address range of region ``l`` begins at ``l * layer_stride``::

    | shift | R resident pages | W pooled pages (ring slot l mod B) | padding |
            ^ block 0          ^ multiple of g                                ^ multiple of g

``shift = (-R * p) mod g`` puts the resident/pooled boundary of every region on
a multiple of ``g`` for any page size. The ring is mapped in the further regions, too, so that a
tensor over a region has memory behind each of its bytes; nobody copies there. In a draft layer's
region the pooled pages are memory of its own: drafts run several times a step, and a page is
copied there once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from pie_vllm.errors import ConfigError

DEFAULT_RING_SLOTS = 3
"""Ring slots: one being read, one ready, one being filled. Two hide a copy only if it never takes
longer than the layer before it."""

RING_FRACTION_MAX = 0.15
"""Upper bound on the share of the device's KV bytes for a ring whose width follows the link. It
matters on devices of a few blocks: with thousands of blocks a link feeds some percent of them."""

UNKNOWN_LINK_FRACTION = 0.05
"""Share of the device's KV bytes for the ring where the link could not be measured."""

CHUNK_BYTES_MIN = 64 << 20
"""Lower bound on the target size of a chunk of the host pool; a chunk holds whole rows."""

CHUNK_BYTES_MAX = 1 << 30
"""Upper bound on it: Linux 6.11 to 6.13 refuse to pin 2 GiB in one call (cuda_driver pins a chunk
in one), and a chunk is what a growing pool waits for."""

CHUNKS_MIN = 16
"""Number of chunks that a pool has at least, unless they would be below ``CHUNK_BYTES_MIN``: it
grows and shrinks by whole ones."""

CHUNKS_MAX = 4096
"""Number of chunks above which they are larger than ``CHUNK_BYTES_MIN``: each is a registration
with the driver."""

COPY_SECONDS = 25e-6
"""Duration of a copy that a link does at its full speed, in seconds: 9 MB over NVLink-C2C, which
wants 8 MiB; 1.4 MB over PCIe 5."""

EXTENT_BLOCKS = 32
"""Maximum number of blocks that placement keeps together; large chunks hold a multiple."""

PAGE_TABLE_SHARE = 512
"""Bytes of the CPU pool for which a CUDA device may take one byte of its own memory: its page
tables have an entry of 8 bytes for each registered page of 4 KiB. Larger pages take less, so this
is an upper bound; it is not measured yet."""

MIN_RESIDENT_BLOCKS = 4
"""Resident blocks without which nothing runs: the null block, a tail that is being written, the
block after it, one spare."""

BYTES_MAX = 2**63 - 1
"""Upper bound on every size in bytes: the native engine counts in signed 64 bits."""

_MAY_BE_NONE = ("--pie-pool-gib", "--kv-cache-memory-bytes", "without a pool")
"""Words of the sizes that may be 0."""


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def page_table_bytes(pool_bytes: int) -> int:
    """Upper bound on the device bytes that a pool's page tables take on CUDA."""
    return cdiv(pool_bytes, PAGE_TABLE_SHARE)


def check_device_bytes(left: int, tables: int, pool_bytes: int) -> int:
    """Check that device bytes are left for KV beside the pool's page tables.

    Args:
        left: device bytes for KV without the page tables.
        tables: bytes of the page tables.
        pool_bytes: bytes of the CPU pool.

    Returns:
        ``left``.

    Raises:
        ConfigError: none are left.
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
    """Pooled blocks that a link brings in one step: ``ceil(link * step / row_bytes)``, at least 1.

    More blocks are pooled only where requests take turns, or in bursts. A narrower window leaves
    part of the link without work in every step. In the simulator (60 random machines and loads with
    links of 0.1 to 400 GB/s, 2026-11-22) windows of half to twice this number are within 2 % of the
    best in the mean; wider ones cost more residents than they give.

    Args:
        link_bytes_per_s: speed from the CPU to the device, bytes per second.
        step_seconds: duration of a step that only decodes, with attention over the KV that the
            device holds: blocks are pooled only once it is full.
        row_bytes: bytes of one block in all layers.
    """
    return max(1, math.ceil(link_bytes_per_s * step_seconds / row_bytes))


def chunk_target(pool_bytes: int, num_layers: int, link_bytes_per_s: float | None = None) -> int:
    """Target size of a chunk of the pool: ``COPY_SECONDS`` of the link in each layer, in bounds.

    Rows of a layer lie together within a chunk, so no copy is longer than a chunk's share of a
    layer.

    Args:
        pool_bytes: bytes of the CPU pool.
        num_layers: attention layers with KV.
        link_bytes_per_s: speed from the CPU to the device; None if unknown.
    """
    wanted = num_layers * math.ceil((link_bytes_per_s or 0) * COPY_SECONDS)
    wanted = max(min(wanted, pool_bytes // CHUNKS_MIN), pool_bytes // CHUNKS_MAX)
    return min(max(wanted, CHUNK_BYTES_MIN), CHUNK_BYTES_MAX)


@dataclass(frozen=True)
class Geometry:
    """All sizes that scheduler, workers and engine share.

    Attributes:
        num_layers: ``L``, number of layers with a pool.
        page_bytes: ``p``, bytes of one block in one layer.
        resident_blocks: ``R``, number of resident blocks, vLLM's null block (id 0) included.
        pooled_blocks: ``W``, number of pooled ids that can be in use at once.
        ring_slots: ``B``, number of layers whose pooled pages the ring holds.
        rows: number of blocks that the CPU pool holds, at least ``W``.
        chunk_rows: rows of one chunk; no run of rows crosses a chunk.
        granularity: ``g``, bytes that the driver maps in one piece.
        extra_regions: ``N - L - D``, number of regions beyond those of the layers with a pool and
            of draft layers.
        draft_layers: ``D``, number of draft layers whose blocks are pooled.
    """

    num_layers: int
    page_bytes: int
    resident_blocks: int
    pooled_blocks: int
    ring_slots: int
    rows: int
    chunk_rows: int
    granularity: int
    extra_regions: int = 0
    draft_layers: int = 0

    @property
    def num_regions(self) -> int:
        """``N``, number of address ranges of one layer each."""
        return self.num_layers + self.draft_layers + self.extra_regions

    @property
    def num_blocks(self) -> int:
        """``R + W``, the size of vLLM's block pool."""
        return self.resident_blocks + self.pooled_blocks

    @property
    def row_bytes(self) -> int:
        """``(L + D) * p``, CPU bytes of one block."""
        return (self.num_layers + self.draft_layers) * self.page_bytes

    @property
    def load_bytes(self) -> int:
        """``L * p``, bytes that each step loads of a pooled block that it reads."""
        return self.num_layers * self.page_bytes

    @property
    def block_bytes(self) -> int:
        """``N * p``, device bytes of one resident block in all regions."""
        return self.num_regions * self.page_bytes

    @property
    def shift(self) -> int:
        """Bytes before block 0 of a layer; vLLM's ``KVCacheTensor.offset``."""
        return -self.resident_blocks * self.page_bytes % self.granularity

    @property
    def layer_resident_bytes(self) -> int:
        """Bytes mapped for one region's own pages; a multiple of ``g``."""
        return self.shift + self.resident_blocks * self.page_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one ring slot: ``W * p`` rounded up to ``g``."""
        return round_up(self.pooled_blocks * self.page_bytes, self.granularity)

    @property
    def layer_stride(self) -> int:
        """Bytes from one region to the next in the arena's address range."""
        return self.layer_resident_bytes + self.slot_bytes

    @property
    def virtual_bytes(self) -> int:
        """Bytes of the arena's address range, in which each region has its own view of a slot."""
        return self.num_regions * self.layer_stride

    @property
    def ring_bytes(self) -> int:
        """Device bytes of the ring, taken also while nothing is pooled."""
        return self.ring_slots * self.slot_bytes

    @property
    def draft_bytes(self) -> int:
        """Device bytes of the draft layers' pages of pooled blocks."""
        return self.draft_layers * self.slot_bytes

    @property
    def device_bytes(self) -> int:
        """Device bytes in all: ``N * (shift + R * p) + (B + D) * slot_bytes``."""
        return self.num_regions * self.layer_resident_bytes + self.ring_bytes + self.draft_bytes

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
        """Resident blocks that the bytes of the ring and of draft pages would have held."""
        return (self.ring_bytes + self.draft_bytes) / self.block_bytes

    @property
    def capacity_gained_blocks(self) -> int:
        """Blocks of both tiers beyond those that the device's bytes alone would hold."""
        return self.num_blocks - self.device_bytes // self.block_bytes

    def page_offset(self, layer: int, block: int) -> int:
        """Byte offset of a page in the arena's address range."""
        return layer * self.layer_stride + self.shift + block * self.page_bytes


class _Device(NamedTuple):
    """Device memory that residents and ring divide, in the words of this module.

    Attributes:
        num_layers: ``L``.
        page_bytes: ``p``.
        ring_slots: ``B``.
        granularity: ``g``.
        device_bytes: device memory for KV, ring included.
        extra_regions: ``N - L - D``.
        draft_layers: ``D``.
    """

    num_layers: int
    page_bytes: int
    ring_slots: int
    granularity: int
    device_bytes: int
    extra_regions: int = 0
    draft_layers: int = 0

    @property
    def num_regions(self) -> int:
        """``N``, number of pages of one resident block."""
        return self.num_layers + self.draft_layers + self.extra_regions

    @property
    def pooled_pages(self) -> int:
        """``B + D``, number of device pages of one pooled block."""
        return self.ring_slots + self.draft_layers

    def needed_bytes(self, resident: int, window: int) -> int:
        """Device bytes of ``R`` resident and ``W`` pooled blocks."""
        own = round_up(resident * self.page_bytes, self.granularity)
        slot = round_up(window * self.page_bytes, self.granularity)
        return self.num_regions * own + self.pooled_pages * slot

    def residents(self, window: int) -> int:
        """The largest ``R`` that fits beside the ring of ``W`` pooled blocks."""
        left = self.device_bytes - self.needed_bytes(0, window)
        return max(0, (left // self.num_regions) // self.granularity * self.granularity) // (
            self.page_bytes
        )

    def widened(self, window: int, rows: int, needed: int) -> int:
        """The least ``W`` from ``window`` to ``rows`` with ``R + W >= needed``, or the nearest.

        A further pooled block costs ``B + D`` pages and a resident one ``N >= B + D``, so ``R + W``
        does not fall as ``W`` grows, up to rounding; bisection finds the edge.
        """
        low, high = window, rows
        while low < high and self.residents(high) < MIN_RESIDENT_BLOCKS:
            high = (low + high) // 2
        while low < high:
            middle = (low + high) // 2
            if self.residents(middle) + middle >= needed:
                high = middle
            else:
                low = middle + 1
        return low

    def narrowed(self, window: int, resident_min: int, needed: int) -> int:
        """The largest ``W`` up to ``window`` with ``R >= resident_min``, or else 1.

        Where ``R + W`` would then be below ``needed``, ``window`` as it is. ``R`` does not grow
        with ``W``, so bisection finds the edge.
        """
        low, high = 1, window
        while low < high:
            middle = (low + high + 1) // 2
            if self.residents(middle) >= resident_min:
                low = middle
            else:
                high = middle - 1
        return low if self.residents(low) + low >= needed else window


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
    link_bytes_per_s: float | None = None,
    chunk_bytes: int | None = None,
    whole_blocks: int = 0,
    extra_regions: int = 0,
    draft_layers: int = 0,
) -> Geometry:
    """Divide ``device_bytes`` into resident pages and a ring.

    The pool has ``rows = pool_bytes // ((L + D) * p)``. The window is ``W = min(rows, ring_fraction
    * device_bytes // ((B + D) * p))``, without a given fraction also at most ``fed_blocks``; where
    ``R + W`` would be below ``needed_blocks``, ``W`` grows to the least value that reaches it.
    ``R`` is what the other device bytes hold: ``N * roundup(R * p, g) + (B + D) * roundup(W * p,
    g) <= device_bytes``. Where that is not above ``whole_blocks``, ``W`` shrinks as far as it
    takes; if no ``W`` will do, the caller finds fewer residents than it asked for.

    Args:
        num_layers: ``L``, layers with a pool, at least 1.
        page_bytes: bytes of one block in one layer.
        device_bytes: device memory for KV, ring included.
        pool_bytes: CPU memory for KV, in all.
        granularity: bytes that the driver maps in one piece.
        needed_blocks: blocks of one request of ``max_model_len`` tokens.
        ring_slots: ``B``; ``None`` takes ``min(3, L)``.
        ring_fraction: share of ``device_bytes`` that ring and draft pages may take; ``None`` is
            ``RING_FRACTION_MAX`` with ``fed_blocks``.
        fed_blocks: blocks that the link brings in one step; see ``blocks_fed``.
        link_bytes_per_s: speed from the CPU to the device; None if unknown.
        chunk_bytes: target size of one chunk of the pool; None follows the link, see
            ``chunk_target``.
        whole_blocks: blocks that one step must be able to write, all of them resident.
        extra_regions: ``N - L - D``, regions in which only layers of groups without a pool have
            pages.
        draft_layers: ``D``, draft layers whose blocks are pooled.

    Raises:
        ConfigError: the sizes cannot work; says the least that would.
    """
    if chunk_bytes is None:
        chunk_bytes = chunk_target(pool_bytes, num_layers, link_bytes_per_s)
    _check_sizes(
        {
            "the number of attention layers": num_layers,
            "the bytes of a KV page": page_bytes,
            "the driver's granularity": granularity,
            "the blocks of a longest request (--max-model-len)": needed_blocks,
            "the bytes of a chunk": chunk_bytes,
            "the device's KV memory (--kv-cache-memory-bytes)": device_bytes,
            "the pool (--pie-pool-gib)": pool_bytes,
            "the number of regions without a pool": extra_regions,
            "the number of draft layers (without a pool)": draft_layers,
        },
        ring_fraction,
        fed_blocks,
    )
    slots = _slots(ring_slots, num_layers)
    row_pages = num_layers + draft_layers
    rows = _rows(pool_bytes, row_pages * page_bytes)
    device = _Device(
        num_layers, page_bytes, slots, granularity, device_bytes, extra_regions, draft_layers
    )
    share = RING_FRACTION_MAX if ring_fraction is None else ring_fraction
    window = min(rows, int(share * device_bytes) // (device.pooled_pages * page_bytes))
    if ring_fraction is None and fed_blocks is not None:
        window = min(window, fed_blocks)
    needed = needed_blocks + 1  # vLLM's null block takes one id.
    window = _fitted(device, window, rows, needed, whole_blocks)
    geometry = Geometry(
        num_layers=num_layers,
        page_bytes=page_bytes,
        resident_blocks=device.residents(window),
        pooled_blocks=window,
        ring_slots=slots,
        rows=rows,
        chunk_rows=_chunk_rows(rows, chunk_bytes, row_pages * page_bytes),
        granularity=granularity,
        extra_regions=extra_regions,
        draft_layers=draft_layers,
    )
    _check_geometry(geometry, device, needed)
    return geometry


def _slots(ring_slots: int | None, num_layers: int) -> int:
    """``B``. Raises ConfigError."""
    slots = min(DEFAULT_RING_SLOTS, num_layers) if ring_slots is None else ring_slots
    if not 1 <= slots <= num_layers:
        raise ConfigError(
            f'additional_config["pie"]["ring_slots"] {slots} is not possible: the model has '
            f"{num_layers} attention layers. Use a value from 1 to {num_layers} (2 or more to copy "
            "ahead)."
        )
    return slots


def _rows(pool_bytes: int, row_bytes: int) -> int:
    """Blocks that the pool holds. Raises ConfigError."""
    if pool_bytes < row_bytes:
        raise ConfigError(
            f"--pie-pool-gib is too small: {pool_bytes} bytes hold no block. One block of this "
            f"model takes {row_bytes} bytes in all layers; give at least "
            f"{row_bytes / 2**30:.6f} GiB."
        )
    return pool_bytes // row_bytes


def _chunk_rows(rows: int, chunk_bytes: int, row_bytes: int) -> int:
    """Rows of a chunk: whole extents where it holds one."""
    chunk_rows = max(1, min(rows, chunk_bytes // row_bytes))
    if EXTENT_BLOCKS <= chunk_rows < rows:
        chunk_rows -= chunk_rows % EXTENT_BLOCKS
    return chunk_rows


def _fitted(device: _Device, window: int, rows: int, needed: int, whole_blocks: int) -> int:
    """``W``, where a longest request and a step's blocks ask for another than ``window``."""
    if window < 1 or device.residents(window) + window < needed:
        window = device.widened(max(window, 1), rows, needed)
    if device.residents(window) <= whole_blocks:
        window = device.narrowed(window, whole_blocks + 1, needed)
    return window


def _check_geometry(found: Geometry, device: _Device, needed: int) -> None:
    """Refuse sizes with which an engine could not start or could not serve a longest request.

    Raises:
        ConfigError: says what is missing.
    """
    resident, window = found.resident_blocks, found.pooled_blocks
    if resident < MIN_RESIDENT_BLOCKS:
        least = device.needed_bytes(MIN_RESIDENT_BLOCKS, window)
        raise ConfigError(
            f"the device's KV memory of {device.device_bytes} bytes is too small for a ring of "
            f"{found.ring_slots} slots x {window} pooled blocks and {MIN_RESIDENT_BLOCKS} resident "
            f"blocks of {found.page_bytes} bytes a layer: {least} bytes are needed. Raise "
            "--kv-cache-memory-bytes or --gpu-memory-utilization, or lower --max-model-len, "
            '--block-size or additional_config["pie"]["ring_slots"].'
        )
    if resident + window < needed:
        missing = (needed - resident - window) * found.row_bytes
        raise ConfigError(
            f"one request of --max-model-len needs {needed} blocks, but {resident} resident and "
            f"{window} pooled blocks (pool of {found.rows} rows) are all that fit. Raise "
            f"--pie-pool-gib by at least {missing / 2**30:.3f} GiB, raise the device's KV memory, "
            "or lower --max-model-len."
        )
    if found.virtual_bytes > BYTES_MAX:
        raise ConfigError(
            f"{window} pooled blocks in each of {found.num_regions} layers take "
            f"{found.virtual_bytes} bytes of addresses; {BYTES_MAX} are there. Lower "
            '--pie-pool-gib or additional_config["pie"]["ring_fraction"].'
        )


def _check_sizes(
    sizes: dict[str, int], ring_fraction: float | None, fed_blocks: int | None
) -> None:
    """Refuse sizes that no machine has: their products would overflow.

    Raises:
        ConfigError: names the size.
    """
    for name, value in sizes.items():
        least = 0 if any(word in name for word in _MAY_BE_NONE) else 1
        if not least <= value <= BYTES_MAX:
            raise ConfigError(f"{name} cannot be {value}; {least} to {BYTES_MAX} can be.")
    if ring_fraction is not None and not 0 < ring_fraction < 1:
        raise ConfigError(
            f'additional_config["pie"]["ring_fraction"] {ring_fraction} is not a share; use one '
            "above 0 and below 1."
        )
    if fed_blocks is not None and fed_blocks < 0:
        raise ConfigError(f"a link cannot feed {fed_blocks} blocks; measure it again.")

"""How device memory and CPU pool are divided: from their bytes to a ``Geometry``.

The words and letters are those of ``pie_vllm.geometry``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pie_vllm.errors import ConfigError
from pie_vllm.geometry import (
    DEFAULT_RING_SLOTS,
    EXTENT_BLOCKS,
    RING_FRACTION_MAX,
    Geometry,
    cdiv,
    round_up,
)

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


class _Device(NamedTuple):
    """Device memory that residents and ring divide, in the words of ``pie_vllm.geometry``.

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

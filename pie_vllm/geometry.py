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

from dataclasses import dataclass

DEFAULT_RING_SLOTS = 3
"""Ring slots: one being read, one ready, one being filled. Two hide a copy only if it never takes
longer than the layer before it."""

RING_FRACTION_MAX = 0.15
"""Upper bound on the share of the device's KV bytes for a ring whose width follows the link. It
matters on devices of a few blocks: with thousands of blocks a link feeds some percent of them."""

EXTENT_BLOCKS = 32
"""Maximum number of blocks that placement keeps together; large chunks hold a multiple."""


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` for positive integers."""
    return -(-a // b)


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

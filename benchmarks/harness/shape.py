"""How many bytes a model's KV blocks take, and which device sizes the runs compare."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class KvShape:
    """Sizes of the KV cache blocks of one model.

    Attributes:
        layers: attention layers with KV.
        page_bytes: one block in one layer, keys and values.
    """

    layers: int
    page_bytes: int

    @property
    def block_bytes(self) -> int:
        """One block in all layers."""
        return self.layers * self.page_bytes


def kv_shape(model: Path, block_size: int, dtype: str) -> KvShape:
    """Read the KV sizes of the model folder `model` from its config.json."""
    config = json.loads((model / "config.json").read_text())
    per_token = 2 * config["num_key_value_heads"] * config["head_dim"] * DTYPE_BYTES[dtype]
    return KvShape(layers=config["num_hidden_layers"], page_bytes=per_token * block_size)


@dataclass(frozen=True)
class PieSizes:
    """What a pie run is given besides its device bytes.

    Attributes:
        pool_blocks: blocks of the CPU pool, and ids that may be pooled at once.
        ring_slots: layers' worth of pooled pages that the device ring holds.
        ring_fraction: share of the device bytes that the ring may take; None keeps the
            default of pie_vllm.
    """

    pool_blocks: int
    ring_slots: int
    ring_fraction: float | None

    def pool_gib(self, shape: KvShape) -> float:
        """The pool's size, a little above `pool_blocks` blocks against rounding."""
        return round(self.pool_blocks * shape.block_bytes / 2**30 + 5e-5, 4)


def wide_ring(shape: KvShape, device_blocks: int, pool_blocks: int, ring_slots: int) -> PieSizes:
    """Sizes with a ring wide enough for the whole pool, above the default fraction.

    The ring then costs `ring_slots * pool_blocks` pages out of the device bytes. On a real GPU
    the device holds thousands of blocks and the default of 5 % is plenty; with a device of a
    few dozen blocks the pool is larger than the device, and so the ring's share is larger too.
    """
    share = ring_slots * pool_blocks / (shape.layers * device_blocks)
    return PieSizes(pool_blocks, ring_slots, round(share + 5e-4, 3))

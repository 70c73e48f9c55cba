"""How many bytes a model's KV blocks take, and which device sizes the runs compare."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pie_vllm.config import BY_NAME

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
    """Sizes a pie run is given besides its device bytes; None leaves one to pie's default.

    Attributes:
        pool_blocks: size of the CPU pool, in blocks.
        ring_slots: layers' worth of pooled pages that the device ring holds.
        ring_fraction: share of the device bytes that the ring may take.
    """

    pool_blocks: int | None = None
    ring_slots: int | None = None
    ring_fraction: float | None = None

    def engine_keys(self, shape: KvShape) -> dict[str, Any]:
        """The arguments of `pie_vllm.engine_args`."""
        keys: dict[str, Any] = {}
        if self.pool_blocks is not None:  # A little above that many blocks, against rounding.
            keys["pool_gib"] = round(self.pool_blocks * shape.block_bytes / 2**30 + 5e-5, 4)
        if self.ring_slots is not None:
            keys["ring_slots"] = self.ring_slots
        if self.ring_fraction is not None:
            keys["ring_fraction"] = self.ring_fraction
        return keys

    def server_options(self, shape: KvShape) -> list[str]:
        """The same as options of `vllm serve`: flags of those settings that have one."""
        keys = self.engine_keys(shape)
        flags = {key: BY_NAME[key].flag or f"--additional-config.pie.{key}" for key in keys}
        return [f"{flags[key]}={value}" for key, value in keys.items()]


def wide_ring(shape: KvShape, device_blocks: int, pool_blocks: int, ring_slots: int) -> PieSizes:
    """Sizes with a ring wide enough for the whole pool, whatever the link brings.

    The ring then costs `ring_slots * pool_blocks` pages of the device bytes: a larger share than
    on a GPU, where the device holds thousands of blocks and a window of some percent of them is
    all that the link feeds. Its width does not depend on a measured link, so runs are alike.
    """
    share = ring_slots * pool_blocks / (shape.layers * device_blocks)
    return PieSizes(pool_blocks, ring_slots, round(share + 5e-4, 3))

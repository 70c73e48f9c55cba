"""What the policy knows of a block, and the ids that name blocks, rows and requests."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NewType, Protocol, TypeAlias

BlockId = NewType("BlockId", int)
"""Id of a block: resident below the number of resident blocks, pooled from there on."""

Row = NewType("Row", int)
"""Number of a row of the CPU pool, which holds one block's KV."""

RequestId: TypeAlias = str
"""Id of a request. An alias: no other string takes part in placement."""

Table: TypeAlias = "list[Block]"
"""Blocks of a request, in the order of its tokens."""


class Block(Protocol):
    """Part of vLLM's ``KVCacheBlock`` that the policy reads and, of ``ref_cnt``, writes.

    Attributes:
        ref_cnt: Number of requests that use the block.
        is_null: Whether it is vLLM's placeholder, which holds no KV and is never free.
    """

    ref_cnt: int
    is_null: bool

    @property
    def block_id(self) -> BlockId:
        """Id of the block, which never changes."""

    @property
    def block_hash(self) -> Hashable | None:
        """Key of the block in the prefix cache; None while the cache does not know it."""

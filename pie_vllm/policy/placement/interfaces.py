"""Parts of vLLM that placement works on: free lists, the prefix cache, a request's progress."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple, Protocol

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.block import Block


class FreeList(Protocol):
    """Part of vLLM's ``FreeKVCacheBlockQueue`` that the policy calls, one list per tier."""

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks in the list."""

    def popleft(self) -> Block:
        """Take the block to be reused first."""

    def popleft_n(self, n: int) -> list[Block]:
        """Take the ``n`` blocks to be reused first."""

    def remove(self, block: Block) -> None:
        """Take a given block out."""

    def append_n(self, blocks: list[Block]) -> None:
        """Put blocks back as the last to be reused."""

    def prepend_n(self, blocks: list[Block]) -> None:
        """Put blocks back as the first to be reused."""

    def get_all_free_blocks(self) -> list[Block]:
        """All blocks, in the order of reuse."""

    def iter_blocks_after(self, cursor: None) -> Iterator[Block]:
        """All blocks, in the order of reuse."""


class Progress(Protocol):
    """Part of vLLM's ``Request`` that says how far it is."""

    @property
    def num_computed_tokens(self) -> int:
        """Number of tokens whose KV is computed, those of steps in flight included."""


def _refuse(block: Block, key: Hashable, index: int) -> None:
    raise IntegrityError(f"block {block.block_id} cannot get the entry of {key!r} at {index}")


class PrefixEntries(NamedTuple):
    """Changes of the prefix cache, which is vLLM's.

    Attributes:
        move: Makes the entry of the first block point to the second, which has none.
        drop: Removes the entry of a block, if it has one.
        put: Gives a block without an entry that of a key, as the block at this index of a
            request. Needed where anything is parked; refuses by default.
    """

    move: Callable[[Block, Block], None]
    drop: Callable[[Block], None]
    put: Callable[[Block, Hashable, int], None] = _refuse

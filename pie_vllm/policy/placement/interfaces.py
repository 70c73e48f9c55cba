"""Parts of vLLM that placement works on: free lists, the prefix cache, a request's progress."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeAlias

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.block import Block, RequestId, Table


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


class GroupBeside(NamedTuple):
    """A group of layers without a pool, whose blocks are resident: windows, chunks or states.

    Attributes:
        number: Index among the model's groups.
        tables: Blocks of each request, in order; null blocks for those that it gave back.
        needed: Gives the places of the blocks without which a request cannot go on after so many
            tokens.
    """

    number: int
    tables: Mapping[RequestId, Table]
    needed: Callable[[int], range]


Cached: TypeAlias = "Callable[[Sequence[Any]], list[Any]]"
"""Look-up in the prefix cache: of each of some keys a block with its KV, or None."""


def _refuse(block: Block, key: Hashable, index: int) -> None:
    raise IntegrityError(f"block {block.block_id} cannot get the entry of {key!r} at {index}")


class PrefixEntries(NamedTuple):
    """Changes of the prefix cache, which is vLLM's.

    Attributes:
        move: Makes the entry of the first block point to the second, which has none.
        drop: Removes the entry of a block, if it has one.
        put: Gives a block without an entry that of a key, as the block at this index of a
            request. Needed where anything is parked; refuses by default.
        drop_all: Removes the entries of blocks that have one; None is ``drop`` for each.
        pooled: Whether the entry of a block is one of the pooled group; None where all are.
        put_all: ``put`` for each of several blocks, keys and indices; None is ``put`` for each.
        key_of: The key of a block's entry, or None; it is asked for every block that is given out.
    """

    move: Callable[[Block, Block], None]
    drop: Callable[[Block], None]
    put: Callable[[Block, Hashable, int], None] = _refuse
    drop_all: Callable[[Sequence[Block]], None] | None = None
    pooled: Callable[[Block], bool] | None = None
    put_all: Callable[[Sequence[Block], Sequence[Hashable], Sequence[int]], None] | None = None
    key_of: Callable[[Block], Hashable | None] = attrgetter("block_hash")

    def drop_cached(self, blocks: Sequence[Block]) -> None:
        """Remove the entries of those of the blocks that have one."""
        keys = [*map(self.key_of, blocks)]
        cached = blocks
        if None in keys:
            cached = [b for b, key in zip(blocks, keys, strict=True) if key is not None]
        if self.drop_all is not None:
            self.drop_all(cached)
        else:
            for block in cached:
                self.drop(block)

    def put_each(
        self, blocks: Sequence[Block], keys: Sequence[Hashable], indices: Sequence[int]
    ) -> None:
        """``put`` for each of these blocks, which have no entry."""
        if self.put_all is not None:
            self.put_all(blocks, keys, indices)
        else:
            for block, key, index in zip(blocks, keys, indices, strict=True):
                self.put(block, key, index)

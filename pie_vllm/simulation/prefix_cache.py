"""The prefix cache and the free lists of a simulation, in place of vLLM's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from pie_vllm.policy.block import BlockId
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.policy.placement.interfaces import PrefixEntries


class Block:
    """What the policy needs of vLLM's ``KVCacheBlock``."""

    __slots__ = ("block_hash", "block_id", "is_null", "ref_cnt")

    def __init__(self, block_id: int) -> None:
        self.block_id = BlockId(block_id)
        self.ref_cnt = 0
        self.is_null = False
        self.block_hash: Any = None


class Free:
    """A free list of blocks."""

    def __init__(self, blocks: list[Any]) -> None:
        self._blocks: OrderedDict[int, Any] = OrderedDict((b.block_id, b) for b in blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks in the list."""
        return len(self._blocks)

    def popleft(self) -> Any:
        """Take the first block."""
        return self._blocks.popitem(last=False)[1]

    def popleft_n(self, n: int) -> list[Any]:
        """Take the first ``n`` blocks."""
        return [self.popleft() for _ in range(n)]

    def remove(self, block: Any) -> None:
        """Take a given block out."""
        del self._blocks[block.block_id]

    def append_n(self, blocks: list[Any]) -> None:
        """Put blocks back as the last."""
        self._blocks.update((block.block_id, block) for block in blocks)

    def prepend_n(self, blocks: list[Any]) -> None:
        """Put blocks back as the first."""
        for block in reversed(blocks):
            self._blocks[block.block_id] = block
            self._blocks.move_to_end(block.block_id, last=False)

    def get_all_free_blocks(self) -> list[Any]:
        """All blocks, in order."""
        return list(self._blocks.values())

    def iter_blocks_after(self, cursor: None) -> Iterator[Any]:  # noqa: ARG002
        """All blocks, in order."""
        return iter(self._blocks.values())


def give_back(queue: TieredFreeBlockQueue, table: Sequence[Any]) -> None:
    """A request gives its blocks back as in vLLM, the last one first and those not cached first."""
    first: list[Any] = []
    last: list[Any] = []
    for block in reversed(table):
        block.ref_cnt -= 1
        if block.ref_cnt == 0:
            (first if block.block_hash is None else last).append(block)
    queue.prepend_n(first)
    queue.append_n(last)


class PrefixBook:
    """Which blocks hold the KV of which key; as in vLLM, several may hold the same."""

    def __init__(self) -> None:
        """Nothing is cached."""
        self._blocks: dict[Hashable, dict[int, Any]] = {}
        self.entries = PrefixEntries(self._move, self.drop, self.put)

    def get(self, key: Hashable) -> Any:
        """A block with the KV of a key, or None."""
        blocks = self._blocks.get(key)
        return None if blocks is None else next(iter(blocks.values()))

    def find(self, keys: Iterable[Hashable]) -> list[Any]:
        """Of each key a block with its KV, or None."""
        return [*map(self.get, keys)]

    def hits(self, keys: Iterable[Hashable]) -> list[Any]:
        """Blocks of the first of these keys, up to one that has none."""
        return list(takewhile(lambda block: block is not None, map(self.get, keys)))

    def put(self, block: Any, key: Hashable, index: int = 0) -> None:  # noqa: ARG002
        """A block without a key holds the KV of this one."""
        block.block_hash = key
        self._blocks.setdefault(key, {})[block.block_id] = block

    def drop(self, block: Any) -> None:
        """A block is not found any more, if it was."""
        key, block.block_hash = block.block_hash, None
        if key is not None:
            blocks = self._blocks[key]
            del blocks[block.block_id]
            if not blocks:
                del self._blocks[key]

    def _move(self, source: Any, target: Any) -> None:
        key = source.block_hash
        self.drop(source)
        if key is not None:
            self.put(target, key)

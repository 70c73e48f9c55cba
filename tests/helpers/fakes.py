"""A block pool, block tables and free lists without vLLM, for tests of the policy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.policy.placement.interfaces import GroupBeside, PrefixEntries
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.simulation.prefix_cache import Block, Free, give_back


class FakeBlock(Block):
    """As the simulator's, with room for what a test notes on it."""

    pending: Any = None


class FakePool:
    """The part of vLLM's BlockPool and managers that the policy meets.

    Attributes:
        residency: the policy under test.
        cached: block by hash, the prefix cache.
        tables: blocks of each request.
    """

    def __init__(
        self,
        geometry: Geometry,
        parking: str | None = None,
        beside: Sequence[GroupBeside] = (),
    ) -> None:
        self.blocks = [FakeBlock(i) for i in range(geometry.num_blocks)]
        self.cached: dict[Any, FakeBlock] = {}
        self.tables: dict[str, list[Any]] = {}
        entries = PrefixEntries(self._move, self.drop, self._put)
        self.residency = Residency(
            geometry, self.blocks, Free, self.tables, entries, parking, beside=beside
        )
        null = self.residency.queue.popleft()
        null.is_null = True
        null.ref_cnt = 0

    def _move(self, source: Any, target: Any) -> None:
        assert target.block_hash is None
        if source.block_hash is not None:
            target.block_hash, source.block_hash = source.block_hash, None
            self.cached[target.block_hash] = target

    def _put(self, block: Any, key: Any, index: int) -> None:  # noqa: ARG002
        assert block.block_hash is None
        assert key not in self.cached
        block.block_hash = key
        self.cached[key] = block

    def find(self, keys: Sequence[Any]) -> list[Any]:
        """Block of each key, or None."""
        return [*map(self.cached.get, keys)]

    def drop(self, block: Any) -> None:
        """Remove a block's prefix-cache entry."""
        if block.block_hash is not None:
            del self.cached[block.block_hash]
            block.block_hash = None

    def allocate(self, request_id: str, count: int) -> bool:
        """Give a request new resident blocks, if they can be had."""
        queue = self.residency.queue
        if count > queue.num_free_blocks:
            return False
        for block in queue.popleft_n(count):
            self.drop(block)
            block.ref_cnt = 1
            self.tables[request_id].append(block)
        return True

    def hit(self, request_id: str, blocks: list[FakeBlock]) -> None:
        """Give a request cached blocks."""
        for block in blocks:
            if block.ref_cnt == 0:
                self.residency.queue.remove(block)
            block.ref_cnt += 1
            self.tables[request_id].append(block)

    def free(self, request_id: str) -> None:
        """Take a request's blocks back, the last one first."""
        self.residency.forget(request_id)
        give_back(self.residency.queue, self.tables.pop(request_id))

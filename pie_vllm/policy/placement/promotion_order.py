"""Which pooled blocks are promoted next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from pie_vllm.policy.block import Block, RequestId, Table
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.placement.victims import Victims


class PooledStretch(NamedTuple):
    """Neighbouring pooled blocks to promote, where they stand, and in the tables of whom."""

    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    blocks: Sequence[Block]
    users: Sequence[RequestId]


class PromotionOrder:
    """The order in which pooled blocks are promoted: those of the request admitted first go first.

    It is the counterpart of ``Victims``. A shared block comes alone, with all of its users.
    """

    def __init__(
        self,
        tables: Mapping[RequestId, Table],
        boundary: int,
        window: int,
        read_set: ReadSet,
        victims: Victims,
    ) -> None:
        """Over the books of placement.

        Args:
            tables: Block table of each request.
            boundary: Number of resident blocks; ids below it are resident.
            window: Number of pooled ids.
            read_set: Pooled blocks of each request.
            victims: Requests that hold blocks, in the order of admission.
        """
        self._tables, self._boundary, self._window = tables, boundary, window
        self._read_set, self._victims = read_set, victims

    def stretches(
        self, fresh: Collection[RequestId], room: int, load_blocks_max: int | None
    ) -> Iterator[PooledStretch]:
        """Blocks to promote; each stretch is promoted before the next one is asked for.

        Args:
            fresh: Requests whose tables were sent already; their blocks stay where they are.
            room: Number of free residents to use.
            load_blocks_max: Maximum number of blocks that the step loads; None for no bound.
        """
        read_set, victims = self._read_set, self._victims
        spare = self._window if load_blocks_max is None else load_blocks_max - read_set.num_blocks
        for request_id in victims.holders:
            if room <= 0:
                break
            if request_id in fresh or not read_set.pooled(request_id):
                continue
            running, index, table = read_set.is_running(request_id), 0, self._tables[request_id]
            while room > 0 and index < len(table) and (running or spare > 0):
                block = table[index]
                if block.block_id < self._boundary:
                    index += 1
                    continue
                blocks, users = [block], [request_id]
                if block.ref_cnt > 1:
                    users = victims.users(index, block)
                else:
                    most = index + (room if running else min(room, spare))
                    blocks = self._private(table[index:most])
                if not any(user in fresh for user in users):
                    yield PooledStretch(index, blocks, users)
                    room -= len(blocks)
                    spare -= 0 if running else len(blocks)  # Loads that the step would do without.
                index += len(blocks)

    def _private(self, blocks: list[Block]) -> list[Block]:
        """The first of these blocks, up to one that is resident or shared."""
        for number, block in enumerate(blocks):
            if block.block_id < self._boundary or block.ref_cnt > 1:
                return blocks[:number]
        return blocks

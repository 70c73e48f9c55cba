"""Which block is demoted next."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from math import inf
from typing import NamedTuple

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.block import Block, RequestId, Table
from pie_vllm.policy.placement.interfaces import Progress
from pie_vllm.policy.pool.extents import CHAIN


class Holder:
    """What the policy keeps of one request that holds blocks.

    Attributes:
        request_id: Id of the request.
        serial: Place in the order of admission.
        chain: First place of its blocks (``pie_vllm.policy.pool.extents``).
        full: Number of blocks at the front whose KV is complete.
        cursor: Index from which on the search for a private, resident, full block continues.
        listed: Whether such a block may stand at the cursor or after it.
        due: First step in which its last block can be complete; infinite until its progress is
            known.
        progress: vLLM's request; None until its first step is planned.
    """

    __slots__ = ("chain", "cursor", "due", "full", "listed", "progress", "request_id", "serial")

    def __init__(self, request_id: RequestId, serial: int) -> None:
        """Start without a complete block."""
        self.request_id = request_id
        self.serial = serial
        self.chain = serial * CHAIN
        self.full = 0
        self.cursor = 0
        self.listed = False
        self.due = inf
        self.progress: Progress | None = None


class Stretch(NamedTuple):
    """Neighbouring blocks to demote, and where they stand in the table of one of their users."""

    request_id: RequestId
    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    blocks: list[Block]


class Victims:
    """The requests that hold blocks, and the order in which their blocks are demoted.

    Private blocks of the request admitted last go first, all of one request
    before the next, so that few requests stream; shared blocks only where
    private ones do not suffice. Finding a private block costs constant time on
    average, however many requests there are.

    Attributes:
        holders: Requests that hold blocks, by id, in the order of admission.
        full: Whether a resident block is in use and its KV complete, by block id.
    """

    def __init__(self, tables: Mapping[RequestId, Table], resident_blocks: int) -> None:
        """Start without requests; ``tables`` holds the blocks of each request."""
        self.holders: dict[RequestId, Holder] = {}
        self.full = bytearray(resident_blocks)
        self._tables = tables
        self._boundary = resident_blocks
        self._serial = 0
        self._listed: list[int] = []
        self._by_serial: dict[int, Holder] = {}
        self._chains: set[int] = set()

    def admit(self, request_id: RequestId, hits: int) -> None:
        """A request gets its first blocks, ``hits`` of them full; no change if known."""
        if request_id not in self.holders:
            self._serial += 1
            holder = self.holders[request_id] = Holder(request_id, self._serial)
            self._by_serial[self._serial] = holder
            holder.full = hits
            self._chains.add(holder.chain)
            self.offer(holder)

    def forget(self, request_id: RequestId) -> Holder | None:
        """A request gives its blocks back; returns what was known of it."""
        holder = self.holders.pop(request_id, None)
        if holder is None:
            return None
        del self._by_serial[holder.serial]
        self._chains.discard(holder.chain)
        if holder.listed:
            self._listed.pop(bisect_left(self._listed, holder.serial))
        return holder

    def continue_chain(self, holder: Holder, chain: int) -> None:
        """A request's blocks continue a chain, unless another request that is there has it."""
        if chain not in self._chains:
            self._chains.discard(holder.chain)
            self._chains.add(chain)
            holder.chain = chain

    def offer(self, holder: Holder) -> None:
        """The request may have a private resident full block at its cursor or after."""
        if not holder.listed:
            holder.listed = True
            insort(self._listed, holder.serial)

    def offer_from(self, request_id: RequestId, index: int) -> None:
        """Block ``index`` of a request is resident, full and in use."""
        holder = self.holders[request_id]
        if index < holder.cursor:
            holder.cursor = index
        self.offer(holder)

    def _demotable(self, block: Block) -> bool:
        block_id = block.block_id
        return block_id < self._boundary and bool(self.full[block_id])

    def private(self, count: int) -> Stretch | None:
        """The next blocks, at most ``count`` neighbours, that one request alone uses.

        Returns:
            None when the search finds none.
        """
        full, boundary = self.full, self._boundary
        while self._listed:
            holder = self._by_serial[self._listed[-1]]
            table = self._tables.get(holder.request_id, [])
            for index in range(holder.cursor, min(holder.full, len(table))):
                block = table[index]
                block_id = block.block_id
                if block_id < boundary and full[block_id] and block.ref_cnt == 1:
                    holder.cursor = index
                    last = min(index + count, holder.full, len(table))
                    return Stretch(holder.request_id, index, self._stretch(table[index:last]))
            holder.cursor = holder.full
            holder.listed = False
            self._listed.pop()
        return None

    def _stretch(self, blocks: list[Block]) -> list[Block]:
        """The first of these blocks, up to one that is not private, resident and full."""
        full, boundary = self.full, self._boundary
        for number, block in enumerate(blocks):
            block_id = block.block_id
            if block_id >= boundary or not full[block_id] or block.ref_cnt != 1:
                return blocks[:number]
        return blocks

    def rest(self) -> Iterator[Stretch]:
        """Blocks that ``private`` passed over: those private by now, then shared ones.

        Costs a pass over the tables. Each block comes alone and may be demoted when it does.
        """
        for shared in (False, True):
            for request_id in reversed(self.holders):
                full = self.holders[request_id].full
                for index, block in enumerate(self._tables.get(request_id, ())[:full]):
                    if self._demotable(block) and (shared or block.ref_cnt == 1):
                        yield Stretch(request_id, index, [block])

    def users(self, index: int, block: Block) -> list[RequestId]:
        """Requests that hold a block; a shared prefix has one index in all."""
        return [
            request_id
            for request_id in self.holders
            if index < len(table := self._tables.get(request_id, ())) and table[index] is block
        ]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless lists and holders agree."""
        listed = sorted(h.serial for h in self.holders.values() if h.listed)
        if listed != self._listed:
            raise IntegrityError("listed requests disagree with their marks")
        serials = [h.serial for h in self.holders.values()]
        if serials != sorted(serials) or set(serials) != set(self._by_serial):
            raise IntegrityError("serial numbers disagree with the order of admission")

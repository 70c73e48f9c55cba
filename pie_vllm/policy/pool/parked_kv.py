"""KV that no request uses, kept in rows of the CPU pool, and its way out and back."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

from pie_vllm.errors import IntegrityError
from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.rows import RowLedger


class Tail(NamedTuple):
    """The last block of a preempted request, which is not full and so has no hash.

    Attributes:
        row: that holds it.
        index: of the block in the request's table.
        tokens: of the request whose KV is complete with it, from its first token on.
    """

    row: int
    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    tokens: int


class Parking:
    """Decides which KV is kept when its block gets another use, and where.

    A block is parked when its resident page or its pooled id is handed to another use, or before:
    a pooled block's row stays as it is, a resident page is stored to a row before a step writes to
    it. Each parked block is known by its key in vLLM's prefix cache, so what may be shared is
    decided there (salts, LoRA, multimodal inputs are in the hash). The row stays parked when its
    KV is copied back to a resident page: the next use of that page costs no copy. Rows are given up
    when pooled blocks want them, the least worthy first.

    The stores and copies back of a step are collected here and taken at its end. A row that the
    step copies from is pinned until then, because the stores of a step come first.

    Attributes:
        stores: resident id by row, of the coming step; demotions write theirs here, too.
        restores: row by resident id: pages that are filled in the coming step.
        allowance: pages that may still be stored in this step; None is without end.
        tails: of preempted requests.
        parked_blocks: stored for parking since the start.
        ahead_blocks: of these, stored before their page was wanted.
        lost_blocks: cached blocks whose KV was not kept, for want of allowance or rows.
        restored_blocks: copied back to resident pages for requests, full ones and tails.
    """

    def __init__(self, rows: RowLedger, capacity_rows: int, policy: str | None) -> None:
        """Nothing is parked; ``policy`` of eviction None parks nothing at all.

        Raises:
            ConfigError: there is no such policy.
        """
        self._rows = rows
        self._index: ParkedIndex[Hashable] | None = None
        if policy is not None:
            self._index = ParkedIndex(capacity_rows, policy)
        self.stores: dict[int, int] = {}
        self.restores: dict[int, int] = {}
        self.allowance: int | None = None
        self.tails: dict[str, Tail] = {}
        self._pinned: list[Hashable] = []
        self._gone: list[int] = []
        self.parked_blocks = self.ahead_blocks = self.lost_blocks = self.restored_blocks = 0

    @property
    def enabled(self) -> bool:
        """Whether anything may be parked."""
        return self._index is not None

    @property
    def any(self) -> bool:
        """Whether anything is parked, full blocks or tails."""
        return bool(self.tails) or len(self) > 0

    def __len__(self) -> int:
        """Full blocks that are parked."""
        return 0 if self._index is None else len(self._index)

    def rows(self) -> set[int]:
        """All rows that hold parked KV; costs a pass over the pool."""
        tails = {tail.row for tail in self.tails.values()}
        return tails if self._index is None else tails | self._index.rows()

    @property
    def held(self) -> int:
        """Parked rows that pooled blocks cannot have before the step ends."""
        pinned = 0 if self._index is None else len(self._index) - self._index.evictable
        return pinned + len(self._gone)

    # Out: KV that loses its block.

    def evicted(self, block: Any) -> None:
        """A cached resident block that nobody uses gets another use in the coming step."""
        index, key = self._index, block.block_hash
        if index is None or key is None:
            return
        if self.restores.pop(block.block_id, None) is not None:
            return  # Its KV has not come yet; the row is still parked.
        if key in index:
            index.touch(key)
            return
        if not self.keep(block):
            self.lost_blocks += 1

    def keep(self, block: Any) -> bool:
        """Have a cached resident stored and parked, if allowance and rows suffice."""
        index, allowed = self._index, self.allowance is None or self.allowance > 0
        row = self._room() if allowed and index is not None else None
        if row is None or index is None:
            return False
        index.park(block.block_hash, row)
        self._store(row, block.block_id)
        return True

    def parked(self, key: Hashable) -> bool:
        """Whether a row holds the KV of a key, or will after the coming step."""
        return self._index is not None and key in self._index

    def left_row(self, block: Any) -> None:
        """A pooled block loses its id: its row is parked, or free if nobody can ask for its KV."""
        key = block.block_hash
        index = self._index
        if index is None or key is None or key in index:
            self.stores.pop(self._rows.release(block.block_id), None)
        else:
            index.park(key, self._rows.park(block.block_id))

    def keep_tail(self, request_id: str, block: Any, index: int, tokens: int) -> None:
        """A request is preempted: keep its last block, which is resident."""
        row = self._room() if self.enabled else None
        if row is not None:
            self.drop_tail(request_id)
            self.tails[request_id] = Tail(row, index, tokens)
            self._store(row, block.block_id)

    def drop_tail(self, request_id: str) -> None:
        """A tail is of no use any more; no change where there is none."""
        tail = self.tails.pop(request_id, None)
        if tail is not None:
            self.stores.pop(tail.row, None)
            self._rows.free_parked(tail.row)

    def _store(self, row: int, resident: int) -> None:
        self.stores[row] = resident
        self.parked_blocks += 1
        if self.allowance is not None:
            self.allowance -= 1

    def _room(self) -> int | None:
        """A row to park in: a free one, else that of the parked block worth least."""
        row = self._rows.take_parked()
        if row is None and self._index is not None:
            evicted = self._index.evict()
            if evicted is not None:
                return evicted[1]
        return row

    # Back.

    def has(self, key: Hashable) -> bool:
        """Whether the coming step can copy back the KV of a key."""
        index = self._index
        row = None if index is None else index.row_of(key)
        return row is not None and row not in self.stores and key not in self._pinned

    def tail_of(self, request_id: str) -> Tail | None:
        """The tail that the coming step can copy back."""
        tail = self.tails.get(request_id)
        return None if tail is None or tail.row in self.stores else tail

    def pin(self, key: Hashable) -> None:
        """The coming step copies from the row of ``key``: it must not be given up before."""
        assert self._index is not None
        self._index.pin(key)
        self._pinned.append(key)

    def restore(self, key: Hashable, resident: int) -> None:
        """The coming step fills a resident page with the KV of a pinned key; its row stays."""
        assert self._index is not None
        row = self._index.row_of(key)
        if row is None or row in self.stores or key not in self._pinned:
            raise IntegrityError(f"the KV of {key!r} cannot be restored in this step")
        self._index.touch(key)
        self.restores[resident] = row

    def take_tail(self, request_id: str) -> Tail:
        """A request is about to get its tail back: the row must not be given up before."""
        tail = self.tails.pop(request_id)
        self._gone.append(tail.row)
        return tail

    def put_back(self, request_id: str, tail: Tail) -> None:
        """The request does not get it now."""
        self._gone.remove(tail.row)
        self.tails[request_id] = tail

    def restore_tail(self, tail: Tail, resident: int) -> None:
        """The coming step fills a resident page with a tail that was taken."""
        self.restores[resident] = tail.row

    def cancel(self, resident: int) -> None:
        """A page is not filled after all."""
        del self.restores[resident]

    def attach(self, key: Hashable, pooled: int) -> int:
        """A pooled id that has no row takes the row of a parked block, without a copy."""
        assert self._index is not None
        row = self._index.take(key)
        self._rows.adopt(pooled, row)
        return row

    # Rows of pooled blocks.

    def row_for(self, block: Any, pooled: int) -> tuple[int, bool]:
        """The row that a pooled id has for a resident block, and whether the KV is in it already.

        The KV of a block that is demoted is never pinned: only KV that no block holds is restored,
        and the page that it fills is not complete before the step ends.
        """
        rows, index, key = self._rows, self._index, block.block_hash
        if index is not None and key is not None and key in index:
            return self.attach(key, pooled), True
        if index is not None and not rows.has_free:
            self._give_up(index)
        return rows.take(pooled), False

    def _give_up(self, index: ParkedIndex[Hashable]) -> None:
        """Free the row of the parked block worth least, for one that is stored there instead."""
        evicted = index.evict()
        if evicted is not None:
            self._rows.free_parked(evicted[1])
        elif self.tails:
            self.drop_tail(next(iter(self.tails)))

    def promoted(self, block: Any) -> None:
        """A pooled block is copied to a resident page in the coming step; its row stays parked."""
        index, key = self._index, block.block_hash
        if index is None or key is None or key in index:
            row = self._rows.park(block.block_id)
            self._gone.append(row)
            return
        index.park(key, self._rows.park(block.block_id))
        self.pin(key)

    # A step.

    @property
    def pending(self) -> bool:
        """Whether ``take`` has something to do."""
        return bool(self.stores or self.restores or self._pinned or self._gone)

    def take(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The step's stores and its copies back, as pairs of resident id and row."""
        stores = [(resident, row) for row, resident in self.stores.items()]
        restores = list(self.restores.items())
        self.restored_blocks += len(restores)
        self.stores.clear()
        self.restores.clear()
        self._settle()
        return stores, restores

    def _settle(self) -> None:
        """No copy of the coming step reads what was pinned."""
        if self._pinned:
            assert self._index is not None
            for key in self._pinned:
                self._index.unpin(key)
            self._pinned.clear()
        for row in self._gone:
            self._rows.free_parked(row)
        self._gone.clear()

    def clear(self) -> None:
        """Forget all that is parked.

        Raises:
            IntegrityError: some of it is to be copied back in the coming step.
        """
        if self._index is None:
            return
        if self.restores:
            raise IntegrityError("what is parked cannot be forgotten while a step is planned")
        self._settle()
        for row in (*(tail.row for tail in self.tails.values()), *self._index.clear()):
            self.stores.pop(row, None)
            self._rows.free_parked(row)
        self.tails.clear()

    def forget(
        self, keys: Collection[Hashable], rows: Collection[int], requests: Collection[str]
    ) -> None:
        """Forget what is parked under these keys or in these rows, and tails of these requests.

        Raises:
            IntegrityError: some of it is to be copied back in the coming step.
        """
        index = self._index
        if index is None:
            return
        found = {key for row in rows if (key := index.key_of(row)) is not None}
        for key in found.union(key for key in keys if key in index):
            row = index.drop(key)
            self.stores.pop(row, None)
            self._rows.free_parked(row)
        for name in [n for n, t in self.tails.items() if n in requests or t.row in rows]:
            self.drop_tail(name)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows and index agree; costs a pass over the index."""
        if self._index is not None:
            self._index.check_integrity()
        if len(self) + len(self.tails) + len(self._gone) != self._rows.num_parked:
            raise IntegrityError("parked rows disagree with the index")
        if set(self.stores) & set(self.restores.values()):
            raise IntegrityError("a row is stored to and copied from in one step")

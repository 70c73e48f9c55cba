"""KV that no request uses, kept in rows of the CPU pool, and its way out and back."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

from pie_vllm.errors import ConfigError, IntegrityError
from pie_vllm.policy.pool.eviction import POLICIES
from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.tails import Tail, Tails
from pie_vllm.policy.pool.watched_keys import WatchedKeys


class Parking:
    """Decides which KV is kept when its block gets another use, and where.

    A block is parked when its resident page or its pooled id is handed to another use, or before:
    a pooled block's row stays as it is, a resident page is stored to a row before a step writes to
    it. Each parked block is known by its key in vLLM's prefix cache, so what may be shared is
    decided there (salts, LoRA, multimodal inputs are in the hash). The row stays parked when its
    KV is restored to a resident page: the next use of that page costs no copy. Rows are given up
    when pooled blocks want them, the least recently used first, and tails only after all of these.

    Attributes:
        enabled: whether anything may be parked.
        evictable_row: gives the row of a key whose KV is parked and not pinned, or None.
        watched: keys that a look-up remembers; told of those that leave.
        copies: stores and restores of the coming step.
        places: place in a chain of the KV in a block, by block id, as far as it is known; see
            ``pie_vllm.policy.pool.extents``.
        tails: last blocks of preempted requests.
        allowance: pages that may still be stored in this step; None is without end.
        parked_blocks: stored for parking since the start.
        ahead_blocks: number of these that were stored before their page was wanted.
        lost_blocks: cached blocks whose KV was not kept, for want of allowance or rows.
        restored_blocks: restored to resident pages for requests, full ones and tails.
    """

    def __init__(self, rows: RowLedger, capacity_rows: int, policy: str | None) -> None:
        """Nothing is parked; ``policy`` of eviction None parks nothing at all.

        Raises:
            ConfigError: there is no such policy.
        """
        if policy is not None and policy not in POLICIES:
            raise ConfigError(
                f"no eviction policy for parked KV is called {policy!r}; "
                f"choose one of {', '.join(POLICIES)}"
            )
        self.enabled = policy is not None
        self._rows = rows
        self._index: ParkedIndex[Hashable] = ParkedIndex(capacity_rows)
        self.evictable_row = self._index.evictable_row
        self.watched = WatchedKeys()
        # The key parked last in each row: it may have left since.
        self._keys: list[Hashable | None] = [None] * (capacity_rows if self.enabled else 0)
        self.places: dict[int, int] = {}
        self.copies = StepCopies(rows)
        self.tails = Tails(self.copies)
        self.allowance: int | None = None
        self.parked_blocks = self.ahead_blocks = self.lost_blocks = self.restored_blocks = 0

    @property
    def any(self) -> bool:
        """Whether anything is parked, full blocks or tails."""
        return len(self._index) > 0 or len(self.tails) > 0

    def __len__(self) -> int:
        """Number of full blocks that are parked."""
        return len(self._index)

    def rows(self) -> set[int]:
        """All rows that hold parked KV; costs a pass over the index."""
        return {*self._index.rows(), *self.tails.rows()}

    @property
    def held(self) -> int:
        """Parked rows that pooled blocks cannot have before the step ends."""
        return self._index.num_pinned + len(self.copies.leaving)

    # Out: KV that loses its block.

    def evicted(self, blocks: Iterable[Any]) -> None:
        """Cached resident blocks that nobody uses get another use in the coming step."""
        if not self.enabled:
            return
        restores, touch = self.copies.restores, self._index.touch
        for block in blocks:
            if restores and restores.pop(block.block_id, None) is not None:
                continue  # Its KV has not come yet; the row is still parked.
            if not touch(block.block_hash) and not self.keep(block):
                self.lost_blocks += 1

    def keep(self, block: Any) -> bool:
        """Have a cached resident stored and parked, if allowance and rows suffice."""
        if not self.enabled or (self.allowance is not None and self.allowance <= 0):
            return False
        row = self._room(self.places.get(block.block_id))
        if row is None:
            return False
        self._park(block.block_hash, row)
        self._store(row, block.block_id)
        return True

    def parked(self, key: Hashable) -> bool:
        """Whether a row holds the KV of a key, or will after the coming step."""
        return key in self._index

    def left_row(self, block: Any) -> None:
        """A pooled block loses its id: its row is parked, or free if nobody can ask for its KV."""
        if self._can_park(block.block_hash):
            self._park(block.block_hash, self._rows.park(block.block_id))
        else:
            self.copies.stores.pop(self._rows.release(block.block_id), None)

    def keep_tail(self, request_id: str, block: Any, index: int, tokens: int) -> None:
        """A request is preempted: keep its last block, which is resident."""
        row = self._room(None) if self.enabled else None
        if row is not None:
            self.tails.keep(request_id, Tail(row, index, tokens))
            self._store(row, block.block_id)

    def _can_park(self, key: Hashable | None) -> bool:
        return self.enabled and key is not None and key not in self._index

    def _store(self, row: int, resident: int) -> None:
        self.copies.stores[row] = resident
        self.parked_blocks += 1
        if self.allowance is not None:
            self.allowance -= 1

    def _park(self, key: Hashable, row: int) -> None:
        self._index.park(key, row)
        self._keys[row] = key

    def _room(self, place: int | None) -> int | None:
        """A row to park in, that of a place if it can be had; None if none can be."""
        self._give_way(place)
        return self._rows.take_parked(place)

    def _give_way(self, place: int | None) -> bool:
        """Evict parked KV where a place has no row; returns whether there is a row for it now."""
        rows = self._rows
        if place is not None and not rows.offers(place):
            self._evict_extent()
        if not rows.has_free and (evicted := self._index.evict()) is not None:
            key, row = evicted
            self.watched.changed(key)
            self.copies.free(row)
        return rows.has_free

    def _evict_extent(self) -> None:
        """Evict all of the extent of rows in which the least recently used parked block lies.

        Its neighbours were used with it, and a whole extent keeps those together that come next.
        No change where a row of the extent is not evictable: the extent would not become free.
        """
        oldest = self._index.oldest_row
        if oldest is None:
            return
        extents, evictable_row, keys = self._rows.extents, self._index.evictable_row, []
        for row in extents.members(oldest):
            if not extents.is_free(row):
                key = self._keys[row]
                if key is None or evictable_row(key) != row:
                    return
                keys.append(key)
        for key in keys:
            self.watched.changed(key)
            self.copies.free(self._index.remove(key))

    # Back.

    def has(self, key: Hashable) -> bool:
        """Whether the coming step can restore the KV of a key."""
        row = self.evictable_row(key)
        return row is not None and row not in self.copies.stores

    def touch(self, keys: Iterable[Hashable]) -> None:
        """Make these keys the youngest, in this order; no change for those that are not parked."""
        self._index.touch_all(keys)

    def pin(self, keys: Iterable[Hashable]) -> None:
        """The coming step copies from the rows of these keys: they are not given up before."""
        self._index.pin(keys)

    def restore(self, keys: Sequence[Hashable], residents: Sequence[int]) -> None:
        """The coming step fills resident pages with the KV of pinned keys; their rows stay.

        Raises:
            IntegrityError: a key is not pinned, or its KV is stored in this very step; those before
                it are restored then.
        """
        pinned_row, stores, restores = (
            self._index.pinned_row,
            self.copies.stores,
            self.copies.restores,
        )
        for key, resident in zip(keys, residents, strict=True):
            row = pinned_row(key)
            if row is None or row in stores:
                raise IntegrityError(f"the KV of {key!r} cannot be restored in this step")
            restores[resident] = row

    def attach(self, key: Hashable, pooled: int) -> int:
        """A pooled id that has no row takes the row of a parked block, without a copy."""
        row = self._index.remove(key)
        self.watched.changed(key)
        self._rows.adopt(pooled, row)
        return row

    def place_of(self, key: Hashable) -> int:
        """The place of parked KV, or another one with neighbours as its row has them."""
        row = self._index.row_of(key)
        assert row is not None
        place = self._rows.extents.place_of(row)
        return row if place is None else place

    # Rows of pooled blocks.

    def row_for(self, block: Any, pooled: int, place: int) -> tuple[int, bool]:
        """The row that a pooled id has for a resident block, and whether the KV is in it already.

        A row that holds nothing yet is that of the place, if it can be had.

        The KV of a block that is demoted is never pinned: only KV that no block holds is restored,
        and the page that it fills is not complete before the step ends.
        """
        key = block.block_hash
        if key is not None and key in self._index:
            return self.attach(key, pooled), True
        if self.enabled and not self._give_way(place):
            self.tails.drop_oldest()
        return self._rows.take(pooled, place), False

    def promoted(self, block: Any) -> None:
        """A pooled block is copied to a resident page in the coming step; its row stays parked."""
        key, row = block.block_hash, self._rows.park(block.block_id)
        if self._can_park(key):
            self._park(key, row)
            self._index.pin((key,))
        else:
            self.copies.leaving.add(row)

    # A step.

    @property
    def pending(self) -> bool:
        """Whether ``take`` has something to do."""
        return self.copies.pending or self._index.num_pinned > 0

    def take(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The step's stores and its restores, as pairs of resident id and row."""
        stores, restores = self.copies.take()
        self.restored_blocks += len(restores)
        self._index.unpin_all()
        return stores, restores

    def clear(self) -> None:
        """Forget all that is parked.

        Raises:
            IntegrityError: some of it is to be restored in the coming step.
        """
        if self.copies.restores:
            raise IntegrityError("what is parked cannot be forgotten while a step is planned")
        if not self.enabled:
            return
        self._index.unpin_all()
        self.copies.free_leaving()
        self.tails.clear()
        self.watched.all_changed()
        for row in self._index.clear():
            self.copies.free(row)

    def forget(
        self, keys: Collection[Hashable], rows: Collection[int], requests: Collection[str]
    ) -> None:
        """Forget what is parked under these keys or in these rows, and tails of these requests.

        Costs a pass over the index.

        Raises:
            IntegrityError: some of it is to be restored in the coming step.
        """
        index = self._index
        for key in {*index.keys_in(rows), *(key for key in keys if key in index)}:
            self.watched.changed(key)
            self.copies.free(index.remove(key))
        self.tails.drop_in(requests, rows)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows and index agree; costs a pass over the index."""
        self._index.check_integrity()
        parked = len(self.rows() | self.copies.leaving)
        if parked != self._rows.num_parked:
            raise IntegrityError("parked rows disagree with the index")
        if parked != len(self._index) + len(self.tails) + len(self.copies.leaving):
            raise IntegrityError("a row is parked for two")
        if set(self.copies.stores) & set(self.copies.restores.values()):
            raise IntegrityError("a row is stored to and copied from in one step")

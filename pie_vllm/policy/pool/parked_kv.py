"""KV that no request uses, kept in rows of the CPU pool, and its way out and back."""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable, Iterable, Sequence
from itertools import islice
from typing import Any

from pie_vllm.errors import ConfigError, IntegrityError
from pie_vllm.policy.pool.ended_requests import EndedRequests
from pie_vllm.policy.pool.eviction import POLICIES
from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.row_room import RowRoom
from pie_vllm.policy.pool.row_sources import RowSources
from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.tails import Tails
from pie_vllm.policy.pool.watched_keys import WatchedKeys

TOGETHER = 256
"""Maximum number of blocks that are looked at together when they are parked."""


class Parking:
    """Decides which KV is kept when its block gets another use, and where.

    A block is parked when its resident page or its pooled id is handed to another use, or before:
    a pooled block's row stays as it is, a resident page is stored to a row before a step writes to
    it. Each parked block is known by its key in vLLM's prefix cache, so what may be shared is
    decided there (salts, LoRA, multimodal inputs are in the hash), or by its request's name
    (``pie_vllm.policy.admission.request_keys``). The row stays parked when its
    KV is restored to a resident page: the next use of that page costs no copy. Rows are given up
    when pooled blocks want them, the least recently used first, and tails only after all of these.

    Attributes:
        enabled: whether anything may be parked.
        row_of: gives the row that holds the KV of a key, or None.
        watched: keys that a look-up remembers; told of those that leave.
        copies: stores and restores of the coming step.
        places: place in a chain of the KV in a block, by block id, as far as it is known; see
            ``pie_vllm.policy.pool.extents``.
        tails: last blocks of preempted requests.
        ended: what ended requests keep as a whole, where they can be used in no other way.
        wanted: keys that are worth parking; None where all are.
        ahead_blocks: number of blocks that were stored for parking before their page was wanted.
        lost_blocks: cached blocks whose KV was not kept, for want of allowance or rows.
        restored_blocks: restored to resident pages for requests, full ones and tails.
    """

    def __init__(
        self,
        rows: RowLedger,
        capacity_rows: int,
        policy: str | None,
        *,
        preempted_only: bool = False,
        distinct: bool = False,
    ) -> None:
        """Start with nothing parked.

        Args:
            rows: ledger of the pool's rows.
            capacity_rows: number of rows, at most.
            policy: of eviction; None parks nothing at all.
            preempted_only: whether full blocks are parked only if they go with a tail: that of a
                preempted request, or of one that has ended.
            distinct: whether blocks of one key may differ (``RowSources``). A block then gets no
                row that another one of its key was stored to.

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
        capacity_rows = capacity_rows if self.enabled else 0
        self._index: ParkedIndex[Hashable] = ParkedIndex(capacity_rows, rows.extents.size)
        self.row_of = self._index.row_of
        self.watched = WatchedKeys()
        self.places: dict[int, int] = {}
        self.copies = StepCopies(rows)
        self._sources = RowSources(self.row_of, distinct=distinct)
        self._room = RowRoom(rows, self._index, self.copies, self.watched)
        self.tails = Tails(rows, self._room, self.copies, enabled=self.enabled)
        self.ended = EndedRequests(self.tails, self._index, self._room, self.copies)
        self.wanted: Container[Hashable] | None = None
        if preempted_only:
            self.wanted = self._room.wanted = self.tails.keys
            self._room.give_up_whole = self.ended.drop_oldest
        self.ahead_blocks = self.lost_blocks = self.restored_blocks = 0

    @property
    def parked_blocks(self) -> int:
        """Number of blocks that were stored for parking since the start, tails included."""
        return self.copies.parked_blocks

    @property
    def any(self) -> bool:
        """Whether anything is parked, full blocks or tails."""
        return len(self._index) > 0 or len(self.tails) > 0

    def __len__(self) -> int:
        """Number of full blocks that are parked."""
        return len(self._index)

    def rows(self) -> set[int]:
        """All rows that hold parked KV; costs a pass over the index."""
        return {*self._index.rows(), *self.tails.rows(), *self.ended.rows()}

    @property
    def held(self) -> int:
        """Parked rows that pooled blocks cannot have before the step ends."""
        return self._index.num_pinned + len(self.copies.leaving)

    # Out: KV that loses its block.

    def evicted(self, keys: Sequence[Hashable], residents: Sequence[int]) -> None:
        """Cached resident blocks that nobody uses get another use in the coming step."""
        if not self.enabled:
            return
        if self.wanted is not None:
            keys, residents = self._worth_parking(keys, residents)
        restores, index, done = self.copies.restores, self._index, 0
        if self._sources.residents:
            self._sources.forget([row for row in map(index.row_of, keys) if row is not None])
        if restores and not restores.keys().isdisjoint(residents):
            keys, residents = self._filled(keys, residents)
        if len(keys) == 1:  # As for each running request at the end of a block.
            if not index.touch(keys[0]) and not self._keep(keys[0], residents[0]):
                self.lost_blocks += 1
            return
        while done < len(keys):
            done += index.touch_first(islice(keys, done, None))
            new = index.lacking(keys[done : done + TOGETHER])
            self._keep_all(new, residents[done : done + len(new)])
            done += len(new)

    def _worth_parking(
        self, keys: Sequence[Hashable], residents: Sequence[int]
    ) -> tuple[list[Hashable], list[int]]:
        """Those of the blocks whose keys are wanted; what was to fill the others is not."""
        kept: tuple[list[Hashable], list[int]] = ([], [])
        for key, resident in zip(keys, residents, strict=True):
            if self.wanted is None or key in self.wanted:
                kept[0].append(key)
                kept[1].append(resident)
            else:
                self.copies.restores.pop(resident, None)
        return kept

    def _filled(
        self, keys: Sequence[Hashable], residents: Sequence[int]
    ) -> tuple[list[Hashable], list[int]]:
        """Those of the blocks whose KV has come; the rows of the others are still parked."""
        restores = self.copies.restores
        kept: tuple[list[Hashable], list[int]] = ([], [])
        for key, resident in zip(keys, residents, strict=True):
            if restores.pop(resident, None) is None:
                kept[0].append(key)
                kept[1].append(resident)
        return kept

    def _keep_all(self, keys: Sequence[Hashable], residents: Sequence[int]) -> None:
        """Park the blocks of these keys, which are ``lacking``, as far as allowance and rows go."""
        allowance, done = self.copies.allowance, 0
        most = len(keys) if allowance is None else min(len(keys), max(allowance, 0))
        places = [*map(self.places.get, residents[:most])]
        while done < most and (rows := self._room.take_first(places[done:])):
            end = done + len(rows)
            self._index.park_all(keys[done:end], rows)
            self._sources.forget(rows)
            self.copies.store_all_parked(rows, residents[done:end])
            done = end
        self.lost_blocks += len(keys) - done

    def keep(self, block: Any) -> bool:
        """Have a cached resident stored and parked, if allowance and rows suffice."""
        if not (self.enabled and self._keep(block.block_hash, block.block_id)):
            return False
        row = self.row_of(block.block_hash)
        if row is not None:
            self._sources.note((row,), (block.block_id,))
        return True

    def _keep(self, key: Hashable, resident: int) -> bool:
        allowance = self.copies.allowance
        if allowance is not None and allowance <= 0:
            return False
        row = self._room.take(self.places.get(resident))
        if row is None:
            return False
        self._park(key, row)
        self.copies.store_parked(row, resident)
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

    def _can_park(self, key: Hashable | None) -> bool:
        wanted = key is not None and (self.wanted is None or key in self.wanted)
        return self.enabled and wanted and key not in self._index

    def _park(self, key: Hashable, row: int) -> None:
        self._index.park(key, row)
        self._sources.forget((row,))

    # Back.

    def has(self, key: Hashable) -> bool:
        """Whether the coming step can restore the KV of a key."""
        row = self.row_of(key)
        return row is not None and self.can_restore((row,))

    def can_restore(self, rows: Sequence[int]) -> bool:
        """Whether the coming step can restore from all of these rows, which hold parked KV.

        It can not where it stores the KV first, or where a copy counts on the row already.
        """
        stored, pinned = self.copies.stores.keys(), self._index.pinned_rows
        return stored.isdisjoint(rows) and pinned.isdisjoint(rows)

    def touch(self, keys: Sequence[Hashable]) -> None:
        """Make these keys, which follow each other in a chain, the youngest, in this order.

        No change for those that are not parked.
        """
        self._index.touch_run(keys)

    def pin(self, keys: Sequence[Hashable]) -> list[int]:
        """The coming step copies from the rows of these keys: they are not given up before.

        Returns:
            The row of each.
        """
        return self._index.pin(keys)

    def restore(self, rows: Sequence[int], residents: Sequence[int]) -> None:
        """The coming step fills resident pages with the KV of pinned keys; their rows stay.

        Args:
            rows: as ``pin`` gave them.
            residents: page for each.

        Raises:
            IntegrityError: a row is not pinned, or its KV is stored in this very step; none is
                restored then.
        """
        pinned, stored = self._index.pinned_rows, self.copies.stores.keys()
        if not (pinned.issuperset(rows) and stored.isdisjoint(rows)):
            raise IntegrityError(f"one of {len(rows)} rows cannot be restored from in this step")
        self.copies.restores.update(zip(residents, rows, strict=True))
        self.places.update(zip(residents, self._rows.extents.places_of(rows), strict=True))
        self._sources.note(rows, residents)

    def attach(self, key: Hashable, pooled: int) -> int:
        """A pooled id that has no row takes the row of a parked block, without a copy."""
        row = self._index.remove(key)
        self.watched.changed(key)
        self._rows.adopt(pooled, row)
        self._sources.forget((row,))
        return row

    def place_of(self, key: Hashable) -> int:
        """The place of parked KV, or another one with neighbours as its row has them."""
        row = self.row_of(key)
        assert row is not None
        return self._rows.extents.places_of((row,))[0]

    # Rows of pooled blocks.

    def demoted(self, blocks: Sequence[Any], pooled: Sequence[int], place: int) -> None:
        """Resident blocks get these pooled ids, at places from this one on, and rows for their KV.

        The coming step stores what is in no row yet.
        """
        places, stores, done = range(place, place + len(blocks)), self.copies.stores, 0
        if len(blocks) > 1 and not self._index.any_of([block.block_hash for block in blocks]):
            rows = self._rows.take_at(pooled, [*places])
            stores.update(zip(rows, [block.block_id for block in blocks], strict=False))
            done = len(rows)
        for at in range(done, len(blocks)):
            row, stored = self.row_for(blocks[at], pooled[at], places[at])
            if not stored:
                stores[row] = blocks[at].block_id
        self.places.update(zip(pooled, places, strict=True))

    def row_for(self, block: Any, pooled: int, place: int) -> tuple[int, bool]:
        """The row that a pooled id has for a resident block, and whether the KV is in it already.

        A row that holds nothing yet is that of the place, if it can be had.

        The KV of a block that is demoted is never pinned: only KV that no block holds is restored,
        and the page that it fills is not complete before the step ends.
        """
        key = block.block_hash
        if key is not None and key in self._index and self._sources.has(key, block.block_id):
            return self.attach(key, pooled), True
        if self.enabled and not self._room.give_way(place):
            self.tails.drop_oldest()
        return self._rows.take(pooled, place), False

    def promoted(self, blocks: Sequence[Any], residents: Sequence[int]) -> None:
        """Pooled blocks are copied to residents in the coming step; their rows stay parked."""
        for block, resident in zip(blocks, residents, strict=True):
            key, row = block.block_hash, self._rows.park(block.block_id)
            if self._can_park(key):
                self._index.park(key, row, pinned=True)
                self._sources.note((row,), (resident,))
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
        self.ended.clear()
        self.watched.all_changed()
        for row in self._index.clear():
            self.copies.free(row)

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Forget what is parked under these keys.

        Raises:
            IntegrityError: some of it is to be restored in the coming step.
        """
        self._room.give_up(filter(self._index.__contains__, keys))

    def forget_spoilt(
        self, keys: Collection[Hashable], rows: Collection[int], requests: Collection[str]
    ) -> None:
        """Forget what is parked under these keys or in these rows, and tails of these requests.

        Costs a pass over the index.

        Raises:
            IntegrityError: some of it is to be restored in the coming step.
        """
        self.forget((*self._index.keys_in(rows), *keys))
        self.tails.drop_in(requests, rows)
        self.ended.drop_in(requests, rows)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows and index agree; costs a pass over the index."""
        self._index.check_integrity()
        parked = len(self.rows() | self.copies.leaving)
        if parked != self._rows.num_parked:
            raise IntegrityError("parked rows disagree with the index")
        tails = len(self.tails.rows()) + len(self.ended.rows())
        if parked != len(self._index) + tails + len(self.copies.leaving):
            raise IntegrityError("a row is parked for two")
        if set(self.copies.stores) & set(self.copies.restores.values()):
            raise IntegrityError("a row is stored to and copied from in one step")

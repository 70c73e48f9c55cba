"""What preempted requests keep beside their full blocks, which have keys to be parked by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

from pie_vllm.policy.pool.row_room import RowRoom
from pie_vllm.policy.pool.rows import RowLedger
from pie_vllm.policy.pool.step_copies import StepCopies


class TailBlock(NamedTuple):
    """A block that is kept by its request's name.

    Attributes:
        row: row that holds it.
        index: its place in the request's table of its group.
        group: index of its group of layers among the model's; None for the pooled group.
    """

    row: int
    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    group: int | None = None


class Tail(NamedTuple):
    """The blocks that a request needs beside the full ones in front of them.

    In a plain model it is the last block, which is not full. Where other groups of layers keep
    windows or states, it has their blocks, too: what of the request is of use, is of use together.

    Attributes:
        blocks: these blocks.
        index: number of full blocks in front of them.
        tokens: number of the request's tokens, from its first on, whose KV is complete with it.
        whole: whether full blocks are of no use without the tail, nor fewer tokens than these.
        keys: keys of the full blocks; none where they are worth parking without the tail.
        tokens_beside: number of the tokens that lie behind these.
    """

    blocks: tuple[TailBlock, ...]
    index: int  # type: ignore[assignment]  # the word for it, over tuple.index
    tokens: int
    whole: bool = False
    keys: tuple[Hashable, ...] = ()
    tokens_beside: int = 0

    @property
    def beside(self) -> int:
        """Number of blocks of groups without a pool."""
        return sum(block.group is not None for block in self.blocks)


class Tails:
    """Tails by request, in parked rows of their own, until the request is admitted or gone.

    A tail that was taken belongs to the request's admission: it is restored or put back.

    Attributes:
        keys: keys of full blocks that go with a tail, and how many tails each goes with.
    """

    def __init__(
        self, rows: RowLedger, room: RowRoom, copies: StepCopies, *, enabled: bool = True
    ) -> None:
        """Start without tails.

        Args:
            rows: Ledger of the pool's rows.
            room: Gives rows to keep blocks in.
            copies: Of the coming step.
            enabled: Whether anything may be kept.
        """
        self._rows, self._room, self._copies = rows, room, copies
        self._enabled = enabled
        self._tails: dict[str, Tail] = {}
        self.keys: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        """Number of tails."""
        return len(self._tails)

    @property
    def blocks_max(self) -> int:
        """Number of blocks of the largest tail."""
        return max((len(tail.blocks) for tail in self._tails.values()), default=0)

    def rows(self) -> list[int]:
        """The rows that hold them."""
        return [block.row for tail in self._tails.values() for block in tail.blocks]

    def keep_last(self, request_id: str, block: Any, index: int, tokens: int) -> None:
        """A request is preempted: keep its last block, which is resident, if a row can be had.

        Args:
            request_id: Its name.
            block: Its last block.
            index: Number of full blocks in front of it.
            tokens: Number of its tokens, from its first on, whose KV is complete with this block.
        """
        row = self._room.take(None) if self._enabled else None
        if row is not None:
            self.keep(request_id, Tail((TailBlock(row, index),), index, tokens))
            self._copies.store_parked(row, block.block_id)

    def keep_whole(
        self,
        request_id: str,
        blocks: Sequence[tuple[Any, int, int | None]],
        keys: Sequence[Hashable],
        tokens: int,
        tokens_beside: int,
        *,
        spare_only: bool = False,
    ) -> bool:
        """A request that can go on with all of these only gives them back: keep all or nothing.

        A pooled block without a key keeps its row.

        Args:
            request_id: Its name.
            blocks: Each with its place in its table and its group, as ``TailBlock``.
            keys: Keys of the full blocks in front.
            tokens: Number of its tokens, all of whose KV is in these.
            tokens_beside: Number of them behind those of the full blocks with keys.
            spare_only: Whether KV of requests that come again is not given up for it.

        Returns:
            Whether there was room, and nobody who shares a block is kept in the same step.
        """
        self.drop(request_id)
        # Requests of one prefix may share a window, and a step stores a page once.
        pages = [block.block_id for block, _, _ in blocks]
        if not self._enabled or not self._copies.kept_pages.isdisjoint(pages):
            return False
        take = self._room.take_spare if spare_only else self._room.take
        kept: list[TailBlock] = []
        for block, index, group in blocks:
            pooled = group is None and self._rows.holds(block.block_id)
            row = self._rows.park(block.block_id) if pooled else take(None)
            if row is None:
                for done in kept:
                    self._copies.free(done.row)
                return False
            kept.append(TailBlock(row, index, group))
            if not pooled:
                self._copies.store_parked(row, block.block_id)
            if group is not None:
                self._copies.stores_beside = True
        self._copies.kept_pages.update(pages)
        tail = Tail(tuple(kept), len(keys), tokens, True, tuple(keys), tokens_beside)
        self.keep(request_id, tail)
        return True

    def keep(self, request_id: str, tail: Tail) -> None:
        """Keep the tail of a request in place of an older one."""
        self.drop(request_id)
        self._put(request_id, tail)

    def drop(self, request_id: str) -> None:
        """Forget the tail of a request; no change where there is none."""
        tail = self._tails.pop(request_id, None)
        if tail is not None:
            self.give_up(tail)

    def give_up(self, tail: Tail) -> None:
        """Free the rows of a tail that is no request's any more."""
        self._forget_keys(tail)
        for block in tail.blocks:
            self._copies.free(block.row)

    def set_aside(self, request_id: str) -> Tail:
        """Take the tail of a request that has ended; its rows and its keys stay."""
        return self._tails.pop(request_id)

    def bring_back(self, request_id: str, tail: Tail) -> None:
        """A request has a tail that was set aside."""
        self.drop(request_id)
        self._tails[request_id] = tail

    def drop_oldest(self) -> None:
        """Forget the tail that was kept first; no change where there is none."""
        if self._tails:
            self.drop(next(iter(self._tails)))

    def drop_in(self, requests: Collection[str], rows: Collection[int]) -> None:
        """Forget the tails of these requests, and those in these rows."""
        for name, tail in [*self._tails.items()]:
            if name in requests or any(block.row in rows for block in tail.blocks):
                self.drop(name)

    def clear(self) -> None:
        """Forget all."""
        for name in [*self._tails]:
            self.drop(name)

    def find(self, request_id: str) -> Tail | None:
        """The tail that the coming step can restore; not one that this very step stores."""
        tail = self._tails.get(request_id)
        if tail is None or any(block.row in self._copies.stores for block in tail.blocks):
            return None
        return tail

    def take(self, request_id: str) -> Tail:
        """Take the tail of a request that is about to be admitted; its rows last for the step."""
        tail = self._tails.pop(request_id)
        self._forget_keys(tail)
        self._copies.leaving.update(block.row for block in tail.blocks)
        return tail

    def put_back(self, request_id: str, tail: Tail) -> None:
        """Keep a tail that was taken after all: the request was not admitted."""
        self._copies.leaving.difference_update(block.row for block in tail.blocks)
        self._put(request_id, tail)

    def restore(self, block: TailBlock, resident: int) -> None:
        """Have the coming step fill a resident page with a block of a tail that was taken."""
        self._copies.restores[resident] = block.row
        if block.group is not None:
            self._copies.fills_beside = True

    def _put(self, request_id: str, tail: Tail) -> None:
        self._tails[request_id] = tail
        self.keys.update(tail.keys)

    def _forget_keys(self, tail: Tail) -> None:
        keys = self.keys
        for key in tail.keys:
            keys[key] -= 1
            if not keys[key]:
                del keys[key]

"""What ended requests leave behind as a whole, for requests that begin with all of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

from pie_vllm.policy.pool.parked_index import ParkedIndex
from pie_vllm.policy.pool.row_room import RowRoom
from pie_vllm.policy.pool.step_copies import StepCopies
from pie_vllm.policy.pool.tails import Tail, Tails

TokensOf = Callable[[int, int], "Sequence[int] | None"]
"""Gives the tokens of a request from one place up to another; None where it has not so many, or
where they do not say what its KV is (images, embeddings)."""


class Whole(NamedTuple):
    """What of a request that ends can be kept as a whole.

    Attributes:
        computed: Number of its tokens whose KV is complete, and after which its states are.
        tokens: These tokens.
    """

    computed: int
    tokens: TokensOf


class Ended(NamedTuple):
    """An ended request.

    Attributes:
        request_id: Its name.
        tail: Its blocks beside the full ones, with the keys of these.
        last: Its tokens behind the full blocks, up to ``tail.tokens``.
    """

    request_id: str
    tail: Tail
    last: tuple[int, ...]


class EndedRequests:
    """Ended requests of a model with several groups of layers, the one that ended first in front.

    Its full blocks are of no use without the windows and states at its end, so that what is kept
    of a request is used as a whole, by one that begins with all of its tokens (the next turn of a
    chat), and given up as a whole. One that takes it over has it as if it were a preempted one.

    Attributes:
        changes: Number of requests that were kept since the start.
    """

    def __init__(
        self, tails: Tails, index: ParkedIndex[Hashable], room: RowRoom, copies: StepCopies
    ) -> None:
        """Start without any.

        Args:
            tails: What requests have kept that come again.
            index: Parked full blocks.
            room: Gives up parked full blocks.
            copies: Of the coming step.
        """
        self._tails, self._index, self._room, self._copies = tails, index, room, copies
        self._ended: dict[Hashable, Ended] = {}  # By the key of the last full block.
        self.changes = 0

    def __len__(self) -> int:
        """Number of ended requests."""
        return len(self._ended)

    def rows(self) -> list[int]:
        """The rows of their blocks beside full ones."""
        return [block.row for ended in self._ended.values() for block in ended.tail.blocks]

    def keep(self, request_id: str, tokens: TokensOf) -> bool:
        """A request has ended whose tail was just kept: keep it under its key.

        Returns:
            Whether it has one, and tokens that say what the tail is.
        """
        tail = self._tails.set_aside(request_id)
        last = tokens(tail.tokens - tail.tokens_beside, tail.tokens) if tail.keys else None
        if last is None:
            self._tails.give_up(tail)
            return False
        self.drop(tail.keys[-1])
        self._ended[tail.keys[-1]] = Ended(request_id, tail, tuple(last))
        self.changes += 1
        return True

    def longest(
        self, keys: Sequence[Hashable], tokens: TokensOf, more_than: int
    ) -> tuple[Hashable, Tail] | None:
        """The longest ended request whose tokens another one begins with, with its key.

        Args:
            keys: Keys of the other one's full blocks.
            tokens: The other one's.
            more_than: Number of tokens; ended requests with no more are of no use.
        """
        if self._ended.keys().isdisjoint(keys):
            return None
        for key in reversed(keys):
            ended = self._ended.get(key)
            if ended is None or ended.tail.tokens <= more_than or self._stored_now(ended.tail):
                continue
            tail = ended.tail
            last = tokens(tail.tokens - len(ended.last), tail.tokens)
            if last is not None and tuple(last) == ended.last:
                return key, tail
        return None

    def take_over(self, key: Hashable, request_id: str) -> None:
        """A waiting request goes on where an ended one was."""
        self._tails.bring_back(request_id, self._ended.pop(key).tail)

    def _stored_now(self, tail: Tail) -> bool:
        stores = self._copies.stores
        return any(block.row in stores for block in tail.blocks)

    # Giving up.

    def drop(self, key: Hashable) -> None:
        """Forget an ended request, its parked full blocks too unless others have them in common."""
        ended = self._ended.pop(key, None)
        if ended is not None:
            self._tails.give_up(ended.tail)
            self._room.give_up(self._unwanted(ended.tail))

    def _unwanted(self, tail: Tail) -> Iterator[Hashable]:
        wanted, row_of, pinned = self._tails.keys, self._index.row_of, self._index.pinned_rows
        for key in tail.keys:
            row = row_of(key)
            if row is not None and key not in wanted and row not in pinned:
                yield key

    def drop_oldest(self) -> bool:
        """Forget the request that ended first; returns whether there was one."""
        key = next(iter(self._ended), None)
        if key is not None:
            self.drop(key)
        return key is not None

    def drop_in(self, requests: Collection[str], rows: Collection[int]) -> None:
        """Forget those of these names, and those with a block in these rows."""
        for key, ended in [*self._ended.items()]:
            if ended.request_id in requests or any(b.row in rows for b in ended.tail.blocks):
                self.drop(key)

    def clear(self) -> None:
        """Forget all, but for their parked full blocks."""
        for ended in self._ended.values():
            self._tails.give_up(ended.tail)
        self._ended.clear()

"""Hits on parked KV: what of a waiting request's tokens need not be computed again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from pie_vllm.geometry import cdiv
from pie_vllm.policy.admission.prefix_cursor import PrefixCursor
from pie_vllm.policy.admission.restore import ParkedKey, first_of
from pie_vllm.policy.placement.interfaces import Cached
from pie_vllm.policy.placement.residency import Residency


class ParkedHits(NamedTuple):
    """What follows on the hits of a waiting request that have blocks.

    Attributes:
        found: blocks, and keys of parked ones, in the order of the request's table.
        parked: how many of them are parked.
        residents: of the parked ones, how many get resident pages, the first ones.
        full_tokens: in the hits before and these.
        tokens: with those of the request's tail, if that is restored too.
        cut: whether more is parked than there is room for now, or than this step can copy back.
        more: whether not all keys were looked at: the next step looks on.
        tail: whether the request's tail is restored, too.
        incomplete: whether only part of what is of no use but as a whole can be restored now. Then
            all tokens count as to be computed.
    """

    found: list[Any]
    parked: int
    residents: int
    full_tokens: int
    tokens: int
    cut: bool
    more: bool = False
    tail: bool = False
    incomplete: bool = False

    @classmethod
    def none(cls, tokens: int) -> ParkedHits:
        """Nothing follows on hits of so many tokens."""
        return cls([], 0, 0, tokens, tokens, False)

    @property
    def tail_tokens(self) -> int:
        """Tokens of the block after ``found`` that are restored too."""
        return self.tokens - self.full_tokens


def without_last_block(
    hits: Sequence[Any], parked: ParkedHits | None, block_size: int
) -> tuple[Sequence[Any], ParkedHits | None]:
    """Hits without their last block, which is computed again where heads draft (EAGLE, MTP).

    What such a head keeps of a token depends on the next one, which the block does not have. A
    request's own tail has it: nothing is dropped where that is restored.

    Args:
        hits: cached blocks that the request begins with.
        parked: what follows on them; None if nothing does.
        block_size: tokens of a block.

    Returns:
        Both, without that block.
    """
    if parked is None:
        return hits[:-1], None
    if parked.tail_tokens:
        return hits, parked
    if parked.found:
        is_parked = isinstance(parked.found[-1], ParkedKey)
        count = parked.parked - is_parked
        parked = parked._replace(
            found=parked.found[:-1], parked=count, residents=min(parked.residents, count)
        )
    elif hits:
        hits = hits[:-1]
    full = (len(hits) + len(parked.found)) * block_size
    parked = parked._replace(full_tokens=full, tokens=full)
    return hits, parked if parked.found or parked.cut or parked.more else None


class Room(NamedTuple):
    """What an admission may use.

    Attributes:
        residents: free ones.
        pooled: ids that may come in use.
        chunk_blocks: blocks that one step may fill with prompt tokens.
    """

    residents: int
    pooled: int
    chunk_blocks: int


class Limits(NamedTuple):
    """Bounds of one look; None is none.

    Attributes:
        keys: Maximum number of keys looked at, beyond those remembered.
        at_once: Maximum number of residents that the step fills while the request waits.
        restores: Maximum number of blocks restored even if the request does not wait for more.
    """

    keys: int | None = None
    at_once: int | None = None
    restores: int | None = None


NO_LIMITS = Limits()


class ParkedLookup:
    """Finds parked hits; changes nothing but the order in which blocks are reused or given up.

    It remembers what it found for the request that was refused last, which is the one that is asked
    for first in the next step (``PrefixCursor``).

    Attributes:
        looked: Number of keys that were found in the step; its admission sets it to 0.
    """

    def __init__(
        self, residency: Residency, cached: Cached, block_size: int, ahead: int = 0
    ) -> None:
        """Over the manager's parts; ``ahead`` as ``Admission``."""
        self._residency = residency
        self._cached = cached
        self._block_size = block_size
        self._ahead = ahead
        self._cursor: PrefixCursor | None = None
        self.looked = 0

    def recall(self, request_id: str, state: object) -> list[Any] | None:
        """The cached blocks that a waiting request begins with, as far as they were found before.

        Args:
            request_id: Its name.
            state: Value that is another one if its tokens or their keys are others.

        Returns:
            Blocks, which ``find`` takes as ``hits`` and may extend; None if nothing is remembered.
        """
        cursor = self._cursor
        if cursor is None or not cursor.kept or cursor.name != (request_id, state):
            return None
        cursor.settle()
        hits: list[Any] = cursor.hits
        return hits

    def begin(
        self, request_id: str, state: object, keys: Iterable[Hashable], hits: Sequence[Any]
    ) -> PrefixCursor:
        """The cursor of a request: that of ``hits`` which were recalled, else a new one.

        One that is not kept hears of no change, and its hits may be another request's object, too:
        vLLM has one for all that hit nothing.
        """
        cursor = self._cursor
        if cursor is None or not cursor.kept or cursor.hits is not hits:
            self.forget()
            name = request_id, state
            cursor = PrefixCursor(self._residency, self._cached, name, keys, hits)
            self._cursor = cursor
        return cursor

    def find(
        self,
        request_id: str,
        num_tokens: int,
        keys: Iterable[Hashable],
        hits: Sequence[Any],
        room: Room,
        with_tail: bool = True,
        *,
        state: object = None,
        limits: Limits = NO_LIMITS,
    ) -> ParkedHits | None:
        """The parked blocks behind the ``hits`` that have blocks; None where there are none.

        Args:
            request_id: of a waiting request.
            num_tokens: that it has, the last of which is computed anyway.
            keys: of its blocks after ``hits`` that are full without that token.
            hits: blocks that were found cached, or recalled ones.
            room: for the admission as a whole.
            with_tail: whether the hit may end within a block, with the request's tail.
            state: as ``recall``.
            limits: of this look.
        """
        parking = self._residency.parking
        cursor = self.begin(request_id, state, keys, hits)
        self.looked += cursor.extend(limits.keys)
        found, parked, size = cursor.behind, cursor.parked, self._block_size
        count, more, soon = len(cursor.hits), cursor.more, self._coming(cursor)
        tokens = full = (count + len(found)) * size
        tail = parking.tails.find(request_id) if with_tail else None
        whole = tail is not None and tail.whole
        fits = tail is not None and tail.index * size == full and not more
        if tail is not None and fits:
            tokens = max(full, min(tail.tokens, num_tokens - 1))
            fits = tokens == tail.tokens if whole else tokens > full
        if not (parked or fits or soon or more):
            return None
        idle, pooled = cursor.idle, cursor.idle_pooled
        blocks = cdiv(num_tokens + self._ahead, size) - count
        if tail is not None and whole:
            computed = min(blocks - len(found), room.chunk_blocks + 1)
            beside = tail.beside + len(self._residency.beside) * computed
            room = room._replace(residents=max(0, room.residents - beside))
        free = Room(room.residents - idle + pooled, max(0, room.pooled - pooled), room.chunk_blocks)
        residents = _residents_for(parked, blocks - len(found), free)
        cut = parked - residents > free.pooled
        if cut:
            # What is left out has to be computed, which takes residents.
            residents = _residents_for(parked, blocks, free)
            parked = min(parked, residents + free.pooled)
        if limits.restores is not None and parked > limits.restores and not whole:
            parked, cut = limits.restores, True
            residents = min(residents, parked)
        if cut:
            found = found[:parked] if len(found) == cursor.parked else first_of(found, parked)
            tokens = full = (count + len(found)) * size
            fits = False
        at_once = residents if limits.at_once is None else min(residents, limits.at_once)
        cursor.protect(at_once, room.chunk_blocks)
        if whole and not fits:
            if not (cut or soon or more):
                return None
            return ParkedHits(found, parked, residents, 0, 0, cut or soon, more, incomplete=True)
        return ParkedHits(found, parked, residents, full, tokens, cut or soon, more, fits)

    def _coming(self, cursor: PrefixCursor) -> bool:
        """Whether the block at the gap is only missing in this step.

        KV that the step stores can be copied back by the next.
        """
        return cursor.gap is not None and self._residency.parking.parked(cursor.gap)

    def idle_of(self, hits: Sequence[Any]) -> int:
        """How many of a request's hits nobody uses."""
        cursor = self._cursor
        if cursor is not None and cursor.hits is hits:
            return cursor.idle_hits
        return sum(block.ref_cnt == 0 for block in hits)

    def keep(self, request_id: str) -> None:
        """The request that was looked up last is refused, and will be asked for again."""
        if self._cursor is not None and self._cursor.name[0] == request_id:
            self._cursor.keep()

    def protect_pooled(self) -> None:
        """Make sure that no pooled block of the request is among those handed out next."""
        if self._cursor is not None and self._cursor.idle_pooled:
            self._cursor.freshen()

    def still_parked(self, blocks: int) -> bool:
        """Whether the next parked blocks of the request are still to be restored."""
        return self._cursor is None or self._cursor.still_parked(blocks)

    def restored(self, blocks: Sequence[Any]) -> None:
        """The first blocks that were found behind the hits of a kept request have come back."""
        if self._cursor is not None and blocks:
            self._cursor.restored(blocks)

    def forget(self, request_id: str | None = None) -> None:
        """Remember nothing of a request that was admitted or has ended; None is whichever it is."""
        cursor = self._cursor
        if cursor is not None and request_id in (None, cursor.name[0]):
            cursor.drop()
            self._cursor = None


def _residents_for(parked: int, computed: int, room: Room) -> int:
    """Of parked blocks, those that free residents hold beside the blocks that are computed."""
    return min(parked, max(0, room.residents - min(computed, room.chunk_blocks + 1)))

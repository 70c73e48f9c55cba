"""Keys of preempted requests' KV where there is no prefix cache: each request finds its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

from pie_vllm.policy.block import RequestId
from pie_vllm.policy.placement.interfaces import Cached
from pie_vllm.policy.placement.residency import Residency


class RequestKey(NamedTuple):
    """Key of a full block of one request, by its place in the request's table."""

    request_id: RequestId
    place: int


class RequestKeys:
    """Makes the full blocks of preempted requests cached ones, which their requests alone find.

    From then on they are idle cached blocks like those of a prefix cache: parked when their place
    gets another use, restored when the request is admitted again. A key stands for the first
    tokens of its request up to its block, which never change while the request lasts; where they
    would, as with other weights, the keys are forgotten.
    """

    def __init__(self, residency: Residency, cached: Cached) -> None:
        """Over the manager's parts; nothing is kept."""
        self._residency, self._cached = residency, cached
        self._kept: dict[RequestId, int] = {}

    def keep(self, request_id: RequestId, blocks: Sequence[Any]) -> None:
        """A request is about to give back its blocks, of which these first ones are full."""
        # Blocks that were kept before have their entries still.
        new = [place for place, block in enumerate(blocks) if block.block_hash is None]
        keys = [*_keys(request_id, new)]
        self._residency.entries.put_each([*map(blocks.__getitem__, new)], keys, new)
        if blocks:
            self._kept[request_id] = max(len(blocks), self._kept.get(request_id, 0))

    def of(self, request_id: RequestId, first: int, end: int) -> Iterator[RequestKey]:
        """Keys of a request's blocks from ``first`` up to ``end``, as far as such were kept."""
        return _keys(request_id, range(first, min(end, self._kept.get(request_id, 0))))

    def forget(self, request_id: RequestId) -> None:
        """Nobody asks for a request's KV any more: its rows are free, and its idle blocks next."""
        kept = self._kept.pop(request_id, 0)
        if kept:
            keys = [*_keys(request_id, range(kept))]
            parking = self._residency.parking
            if parking.watched.places:
                for key in keys:
                    parking.watched.changed(key)
            self._drop_entries(keys)
            parking.forget(keys)
            self._residency.supply.withhold()

    def _drop_entries(self, keys: Sequence[RequestKey]) -> None:
        residency, idle = self._residency, []
        while found := [*filter(None, self._cached(keys))]:  # Several may hold the KV of one key.
            residency.entries.drop_cached(found)
            idle += [block for block in found if not block.ref_cnt]
        residency.queue.remove_n(idle)
        residency.queue.prepend_n(idle)


_key: Callable[[tuple[RequestId, int]], RequestKey] = partial(tuple.__new__, RequestKey)


def _keys(request_id: RequestId, places: Iterable[int]) -> Iterator[RequestKey]:
    """A key for each place, made in half the time."""
    return map(_key, zip(repeat(request_id), places))

"""What a waiting request finds of its KV: cached blocks, and what is parked behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from pie_vllm.policy.admission.lookup import ParkedHits, without_last_block
from pie_vllm.policy.admission.transaction import Admission
from pie_vllm.policy.pool.parked_kv import Parking
from pie_vllm.vllm.kv_groups import KvGroups
from pie_vllm.vllm.scheduler_side.block_keys import findable_blocks, hash_keys, tokens_of

Computed: TypeAlias = "tuple[KVCacheBlocks, int, int]"
"""What vLLM's ``get_computed_blocks`` returns: blocks, their tokens, and a boundary among these,
which there is with windows or states only."""


class PrefixLookup:
    """Looks waiting requests up in the prefix cache and among what is parked.

    It remembers what is parked of the request asked for last, until that is admitted or another one
    is asked for.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        stock: Callable[..., Computed],
        admission: Admission,
        parking: Parking,
        groups: KvGroups,
        block_size: int,
        *,
        by_request: bool,
        drops_last: bool,
    ) -> None:
        """Nobody has been looked up.

        Args:
            manager: vLLM's, for what it says of requests, and for its form of blocks.
            stock: vLLM's own ``get_computed_blocks``.
            admission: Looks up what is parked.
            parking: What preempted requests keep by their names, and ended ones by their keys.
            groups: The model's groups of layers, one of which is pooled.
            block_size: Tokens of a block of the pooled group.
            by_request: Whether preempted requests find their KV by name, as there is no prefix
                cache.
            drops_last: Whether the last block of a hit is computed again, for a head that drafts.
        """
        self._manager, self._stock, self._admission = manager, stock, admission
        self._parking, self._groups, self._block_size = parking, groups, block_size
        self._asked: tuple[object, ...] = ()  # For whom ended requests were looked at last.
        self._cached_first: Callable[[Sequence[Any]], list[Any]] = manager.block_pool.cached_first
        self._by_request, self._drops_last = by_request, drops_last
        # Of the request asked for last, with its cached blocks.
        self._parked: dict[str, tuple[ParkedHits, Sequence[Any]]] = {}

    def find(self, request: Request, tokens_max: int | None) -> Computed:
        """As vLLM's ``get_computed_blocks``, with what is parked behind its hits.

        Args:
            request: Waiting.
            tokens_max: Maximum number of tokens that are found; None is all but the last.
        """
        self._parked.clear()
        cap = () if tokens_max is None else (tokens_max,)
        if self._groups.others:
            if cap:
                return self._stock(request, *cap)
            return self._find_kept(request) or self._find_ended(request)
        if not self.looks_up(request):
            return self._stock(request, *cap)
        # Hashes are chained: the last one stands for all.
        state = (request.num_tokens, *cap, *request.block_hashes[-1:])
        hits: Any = self._admission.recall(request.request_id, state)
        boundary, known = 0, hits is not None
        if not known and self._by_request:
            keys = self._keys_behind(request, 0, tokens_max)
            hits = self._cached_first([*keys])
        elif not known:
            found, _, boundary = self._stock(request, *cap)
            hits = found.blocks[0]
            if self._drops_last:
                hits = self._with_dropped(request, hits, tokens_max)
        parked = self._admission.find_parked(
            request.request_id,
            request.num_tokens,
            self._keys_behind(request, len(hits), tokens_max),
            hits,
            with_tail=tokens_max is None,
            state=state,
        )
        if self._drops_last:
            hits, parked = without_last_block(hits, parked, self._block_size)
            known = True
        made = known or self._by_request
        blocks = self._manager.create_kv_cache_blocks((hits,)) if made else found
        if parked is None:
            return blocks, len(hits) * self._block_size, boundary
        self._parked[request.request_id] = parked, hits
        return blocks, parked.tokens, boundary

    def take(self, request_id: str) -> tuple[ParkedHits, Sequence[Any]] | None:
        """What was found parked of a request, and its cached blocks; None if nothing was."""
        return self._parked.pop(request_id, None)

    def looks_up(self, request: Request) -> bool:
        """Whether a request may find KV that was computed before."""
        if self._by_request:  # One that wants logprobs of its prompt computes all of it.
            return not request.skip_reading_prefix_cache
        return bool(self._manager.prefix_cache_lookup_enabled(request))

    def of_pooled(self, blocks: Sequence[Any]) -> KVCacheBlocks:
        """These blocks of the pooled group, and none of others."""
        groups = range(len(self._groups.others) + 1)
        return self._manager.create_kv_cache_blocks(
            tuple(blocks if group == self._groups.pooled else () for group in groups)
        )

    def _find_kept(self, request: Request) -> Computed | None:
        """What a preempted request of a model with several groups kept; None if it is of no use.

        Blocks of groups without a pool are allocated anew, and filled when it is admitted.
        """
        name = request.request_id
        tail = self._parking.tails.find(name)
        if tail is None or not self.looks_up(request):
            return None
        state = (request.num_tokens, *request.block_hashes[-1:])
        hits: Any = self._admission.recall(name, state)
        if hits is None:
            keys = [*self._kept_keys(request, 0, tail.index)]
            hits = self._cached_first(keys)
        keys_behind = self._kept_keys(request, len(hits), tail.index)
        parked = self._admission.find_parked(
            name, request.num_tokens, keys_behind, hits, state=state
        )
        if parked is None:
            return None
        self._parked[name] = parked, hits
        empty = self._manager.empty_kv_cache_blocks
        found = empty if parked.incomplete else self.of_pooled(hits)
        return found, parked.tokens, 0

    def _find_ended(self, request: Request) -> Computed:
        """What an ended request kept with all of whose tokens this one begins, or what vLLM finds.

        The former is this one's from now on, as if this one had been preempted.
        """
        stock, ended, name = self._stock(request), self._parking.ended, request.request_id
        asked = name, request.num_tokens, ended.changes
        if not ended or asked == self._asked or not self.looks_up(request):
            return stock
        self._asked = asked
        end = findable_blocks(request, self._block_size, None)
        keys = [*hash_keys(request, 0, end, self._groups.pooled)]
        found = ended.longest(keys, tokens_of(request, request.num_tokens - 1), stock[1])
        if found is None:
            return stock
        key, tail = found
        if not self._are_there(tail.keys):
            ended.drop(key)
            return stock
        ended.take_over(key, name)
        return self._find_kept(request) or stock

    def _are_there(self, keys: Sequence[Any]) -> bool:
        """Whether all of these full blocks are cached or parked."""
        cached = self._manager.block_pool.cached(keys)
        parked = self._parking.parked
        return all(b is not None or parked(key) for key, b in zip(keys, cached, strict=True))

    def _kept_keys(self, request: Request, first: int, end: int) -> Iterator[Any]:
        if self._by_request:
            return self._admission.request_keys(request.request_id, first, end)
        return hash_keys(request, first, end, self._groups.pooled)

    def _with_dropped(
        self, request: Request, hits: Sequence[Any], tokens_max: int | None
    ) -> Sequence[Any]:
        """The hits with the block that vLLM dropped from their end, if it did.

        ``drop_eagle_block``, v1/core/single_type_kv_cache_manager.py:819 in 0.32. What is parked
        follows on that block.
        """
        keys = [*islice(self._keys_behind(request, len(hits), tokens_max), 1)]
        return [*hits, *self._cached_first(keys)]

    def _keys_behind(self, request: Request, hits: int, tokens_max: int | None) -> Iterator[Any]:
        """Keys of the blocks behind the first ``hits`` of a waiting request that it may find."""
        end = findable_blocks(request, self._block_size, tokens_max)
        if self._by_request:
            return self._admission.request_keys(request.request_id, hits, end)
        return hash_keys(request, hits, end)

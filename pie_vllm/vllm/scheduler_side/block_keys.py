"""The search for parked KV, for vLLM's requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.request import Request

from pie_vllm.policy.admission import lookup
from pie_vllm.policy.admission.lookup import ParkedHits, Room
from pie_vllm.policy.placement.residency import Residency


class ParkedLookup:
    """As the policy's, behind vLLM's own hits."""

    def __init__(self, residency: Residency, block_pool: Any, block_size: int) -> None:
        """Over the manager's parts."""

        def cached(key: Any) -> Any:
            # Asked for each time: a reset of the prefix cache makes a new map.
            return block_pool.cached_block_hash_to_block.get_one_block(key)

        self._lookup = lookup.ParkedLookup(residency, cached, block_size)
        self._block_size = block_size

    def find(
        self, request: Request, hits: Sequence[Any], room: Room, most: int | None = None
    ) -> ParkedHits | None:
        """The parked blocks behind vLLM's own ``hits``; None where there are none.

        As ``FullAttentionManager.find_longest_cache_hit``, it stops at the first block that is
        neither cached nor parked, v1/core/single_type_kv_cache_manager.py:784.

        Args:
            request: waiting, with prefix caching.
            hits: blocks that vLLM found.
            room: for the admission as a whole.
            most: tokens to find at most, in full blocks; None is all but the last token, with
                those of a tail.
        """
        last = request.num_tokens - 1
        end = (last if most is None else min(most, last)) // self._block_size
        hashes = islice(request.block_hashes, len(hits), end)
        keys = (make_block_hash_with_group_id(block_hash, 0) for block_hash in hashes)
        tail = most is None
        return self._lookup.find(request.request_id, request.num_tokens, keys, hits, room, tail)

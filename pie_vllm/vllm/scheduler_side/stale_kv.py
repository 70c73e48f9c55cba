"""KV that weights of before computed: nobody may find it any more (docs/stale_kv.md)."""

from __future__ import annotations

from collections.abc import Mapping
from os import scandir
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import Request

from pie_vllm.policy.admission.transaction import Admission
from pie_vllm.policy.placement.residency import Residency
from pie_vllm.vllm.scheduler_side.block_pool import PieBlockPool

logger = init_logger("vllm.pie")

Adapter = tuple[str, str]
"""Name and path of a LoRA adapter, which is what vLLM hashes, v1/core/kv_cache_utils.py:595."""


class StaleKv:
    """Keeps KV of old weights out of the prefix cache and out of the pool.

    vLLM keeps its prefix cache when weights change, and what it keeps is gone as soon as its
    blocks are used again. Parked KV lives much longer, and new KV that was computed behind a stale
    hit is stale as well. After new weights, therefore, all that is cached is forgotten. After a
    reload of an adapter its requests get other keys, and all other KV stays. Requests that hold
    blocks go on as in vLLM, and nothing of theirs is cached until they give their blocks back.

    Call it between steps: the rows that it frees are written to by later steps only, in order.

    Attributes:
        requests: all unfinished requests by id.
        reloads: adapters by waiting request that has them reloaded when it is admitted.
    """

    def __init__(
        self, residency: Residency, block_pool: PieBlockPool, admission: Admission
    ) -> None:
        """Over the manager's parts, before the first request."""
        self._residency = residency
        self._admission = admission
        self._block_pool = block_pool
        self.requests: Mapping[str, Request] = {}
        self.reloads: dict[str, Adapter] = {}
        self._ids: dict[Adapter, set[int]] = {}
        self._files: dict[Adapter, object] = {}
        self._generations: dict[Adapter, int] = {}

    def new_weights(self) -> None:
        """Forget all cached KV: the weights of the model may be others now."""
        parked = bool(len(self._residency.parking))
        self._residency.forget_idle()
        if self._block_pool.forget_cached() or parked:
            logger.info("Pie: weights may have changed, so all cached KV is forgotten.")
        self._block_pool.not_cached.update(self._residency.tables)

    def adapter_added(self, lora: Any) -> None:
        """The workers were asked to load an adapter; a load that fails counts too."""
        adapter, known = self._meet(lora)
        if known and (lora.load_inplace or lora.lora_int_id not in known):
            self._reloaded(adapter)
        self._files[adapter] = _files(lora.lora_path)

    def adapter_removed(self, lora_id: int) -> None:
        """An adapter was removed: the next request with it reads its files again."""
        for adapter, known in self._ids.items():
            if lora_id in known:
                self._reloaded(adapter)

    def arrives(self, request: Request) -> None:
        """A request is about to wait: give it the keys of the adapter as it is loaded now.

        It may have vLLM reload the adapter in the step that admits it: until then its requests
        share no KV. All requests that vLLM 0.32's server makes for an adapter that was loaded in
        place say so (entrypoints/openai/models/serving.py:225), so only changed files count.
        """
        lora = request.lora_request
        if lora is None:
            return
        adapter, known = self._meet(lora)
        if lora.load_inplace:
            before, now = self._files.get(adapter), _files(lora.lora_path)
            self._files[adapter] = now
            if known and (now is None or now != before):
                self.reloads[request.request_id] = adapter
                self._reloaded(adapter)
        elif known and lora.lora_int_id not in known:
            self._reloaded(adapter)
        self._salt_again(request)

    def scheduled(self) -> None:
        """A step was scheduled: what it computes is of the adapters that it reloads."""
        for request_id, adapter in list(self.reloads.items()):
            if request_id not in self.requests:  # Who reloads the adapter next is not known.
                self._files.pop(adapter, None)
            elif request_id not in self._residency.tables:
                continue
            del self.reloads[request_id]
            self._reloaded(adapter)

    def holds_old_kv(self, request_id: str) -> bool:
        """Whether blocks of a request may hold KV of weights of before."""
        return request_id in self._block_pool.not_cached

    def freed(self, request: Request) -> None:
        """A request has given its blocks back; if it comes again, all is computed anew."""
        if request.request_id in self._block_pool.not_cached:
            self._block_pool.not_cached.remove(request.request_id)
            if request.lora_request is not None and not request.is_finished():
                self._salt_again(request)

    def _meet(self, lora: Any) -> tuple[Adapter, set[int]]:
        """Note an adapter; returns the numbers that it had before.

        Each new number has its files read again. API servers may count each for itself.
        """
        adapter = (lora.lora_name, lora.lora_path)
        known = self._ids.get(adapter, set())
        self._ids[adapter] = known | {lora.lora_int_id}
        return adapter, known

    def _reloaded(self, adapter: Adapter) -> None:
        """Its KV so far has keys that nobody asks for: it leaves when its rows are wanted."""
        self._generations[adapter] = self._generations.get(adapter, 0) + 1
        for request_id, request in self.requests.items():
            lora = request.lora_request
            if lora is None or (lora.lora_name, lora.lora_path) != adapter:
                continue
            if request_id in self._residency.tables:
                self._block_pool.not_cached.add(request_id)
            else:
                self._admission.keeping.forget(request_id)
                self._salt_again(request)

    def _salt_again(self, request: Request) -> None:
        """Give a request the keys of its adapter as it is; its own ones before a reload."""
        lora = request.lora_request
        adapter = (lora.lora_name, lora.lora_path)
        if adapter in self.reloads.values():
            _salt(request, f"request {request.request_id}")
        elif adapter in self._generations:
            _salt(request, f"reload {self._generations[adapter]}")


def _salt(request: Any, salt: str) -> None:
    """Put a salt of ours behind the request's own, which vLLM hashes into its first block.

    Relies on ``request.cache_salt`` in v1/core/kv_cache_utils.py:648.
    """
    if not hasattr(request, "pie_own_salt"):
        request.pie_own_salt = request.cache_salt or ""
    request.cache_salt = f"{request.pie_own_salt}\0pie {salt}"
    request.block_hashes.clear()
    request.update_block_hashes()


def _files(path: str) -> object:
    """What tells whether an adapter's files are others than before; None where there are none."""
    try:
        with scandir(path) as entries:
            found = sorted((e.name, e.stat()) for e in entries if e.is_file())
    except OSError:
        return None
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found]

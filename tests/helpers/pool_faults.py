"""vLLM on a CPU with a pool of small chunks, some of which a rank cannot have."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

SWITCH = "PIE_TEST_POOL_FAULTS"


def environment(chunk_bytes: int, refused: dict[int, int] | None = None) -> dict[str, str]:
    """Of a process that is to call ``enable``.

    Args:
        chunk_bytes: aim for the size of a chunk of the pool.
        refused: by rank, the chunk from which on there is no memory.
    """
    return {SWITCH: json.dumps({"chunk_bytes": chunk_bytes, "refused": refused or {}})}


def enable() -> None:
    """Make vLLM take its worker from here, if this process was asked to."""
    if not os.environ.get(SWITCH):
        return
    from pie_vllm.vllm import args

    args.WORKERS["cpu"] = "tests.helpers.pool_faults.PoolFaultsWorker"


def __getattr__(name: str) -> Any:
    """The worker's class, made when a process asks for it: vLLM is not imported before."""
    if name != "PoolFaultsWorker":
        raise AttributeError(name)
    worker = globals()[name] = _worker_class()
    return worker


def _worker_class() -> type:
    from pie_vllm.errors import TransferError
    from pie_vllm.sizing import plan_geometry
    from pie_vllm.vllm.worker_side import worker
    from pie_vllm.vllm.worker_side.cpu_worker import PieCPUWorker

    faults = json.loads(os.environ[SWITCH])
    patched: Any = partial(plan_geometry, chunk_bytes=faults["chunk_bytes"])
    vars(worker)["plan_geometry"] = patched

    class PoolFaultsWorker(PieCPUWorker):
        """Pie's worker for CPUs, with an engine that refuses chunks."""

        def initialize_from_config(self, kv_cache_config: Any) -> None:
            super().initialize_from_config(kv_cache_config)
            refused = faults["refused"].get(str(self.rank))
            engine: Any = self.pie._engine if self.pie is not None else None
            commit = engine.commit_chunk

            def commit_chunk(chunk: int) -> None:
                if refused is not None and chunk >= refused:
                    raise TransferError("no memory, says the test.")
                commit(chunk)

            engine.commit_chunk = commit_chunk

    return PoolFaultsWorker

"""vLLM's V1 model runner (v1/worker/gpu_model_runner.py).

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm.compat.patching import call_before, expect, swapped


def own_allocation(allocate: Callable[..., Any]) -> AbstractContextManager[None]:
    """Make the V1 model runner get its KV tensors from ``allocate``.

    Relies on ``kv_caches = allocate_kv_cache(``, v1/worker/gpu_model_runner.py:7000.
    """
    from vllm.v1.worker import gpu_model_runner as module

    caller = module.GPUModelRunner.initialize_kv_cache_tensors
    line = "kv_caches = allocate_kv_cache("
    return swapped(module, "allocate_kv_cache", allocate, caller, line)


def before_inputs(runner: Any, then: Callable[[Any], None]) -> None:
    """Call ``then(scheduler_output)`` when the V1 runner updates its states.

    Relies on ``_update_states(scheduler_output)`` at the start of ``execute_model``,
    v1/worker/gpu_model_runner.py:3979, inside the region that is ordered with the
    previous step's input copies.
    """
    expect(type(runner).execute_model, "self._update_states(scheduler_output)")
    call_before(runner, "_update_states", then)


def relabel_rows(runner: Any, relabels: Any, group: int) -> None:
    """Write new block ids of a group into request states and input batch.

    Relies on ``CachedRequestState.block_ids`` and ``BlockTable.block_table.np``,
    v1/worker/gpu_model_runner.py:1426 and v1/worker/block_table.py:102. A
    request that left the persistent batch keeps its ids in its state only.
    """
    batch = runner.input_batch
    for request_id, first, blocks in relabels:
        state = runner.requests.get(request_id)
        if state is None:
            raise UnsupportedError(
                f"request {request_id} is not known to the model runner, though its blocks moved"
            )
        end = first + len(blocks)
        state.block_ids[group][first:end] = blocks
        row = batch.req_id_to_index.get(request_id)
        if row is not None:
            batch.block_table.block_tables[group].block_table.np[row, first:end] = blocks


def forward_pass(runner: Any) -> Callable[[int], float]:
    """A function that times one pass of the V1 runner, for ``model_runner.forward_pass``.

    Relies on ``_dummy_run`` as ``profile_run`` calls it, v1/worker/gpu_model_runner.py:6193, and on
    ``compute_logits`` of what it returns, 5942 there.
    """
    expect(
        type(runner).profile_run,
        "hidden_states, last_hidden_states = self._dummy_run(",
        "self._sync_device()",
    )
    expect(type(runner)._dummy_sampler_run, "self.model.compute_logits(hidden_states)")

    def seconds(tokens: int) -> float:
        start = perf_counter()
        _, last_hidden_states = runner._dummy_run(tokens, is_profile=True)
        with torch.inference_mode():
            runner.model.compute_logits(last_hidden_states)
        runner._sync_device()
        return perf_counter() - start

    return seconds

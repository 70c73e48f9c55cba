"""vLLM's V2 model runner, the default on CUDA (v1/worker/gpu/model_runner.py).

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked. Only
``model_runner`` imports this module, where a V2 runner is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm.compat.patching import call_before, expect, expect_in_order, swapped


def own_allocation(allocate: Callable[..., Any]) -> AbstractContextManager[None]:
    """Make the V2 model runner get its KV tensors from ``allocate``.

    Relies on ``kv_caches = allocate_kv_cache(``, v1/worker/gpu/attn_utils.py:420.
    The small caches that vLLM makes to profile CUDA graphs come earlier, from
    ``determine_available_memory`` (v1/worker/gpu/cudagraph_utils.py:1013), and stay vLLM's own.
    """
    from vllm.v1.worker.gpu import attn_utils as module

    line = "kv_caches = allocate_kv_cache("
    return swapped(module, "allocate_kv_cache", allocate, module.init_kv_cache, line)


def before_inputs(runner: Any, then: Callable[[Any], None]) -> None:
    """Call ``then(scheduler_output)`` when the V2 runner updates its states.

    Finished requests have given back their slots by then and new ones have taken theirs; the block
    tables' staged writes are applied afterwards, whatever else stands between (0.33 updates the
    encoder's inputs there). Relies on these three calls in ``execute_model``,
    v1/worker/gpu/model_runner.py:1735.
    """
    expect_in_order(
        type(runner).execute_model,
        "self.add_requests(scheduler_output)",
        "self.update_requests(scheduler_output)",
        "self.block_tables.apply_staged_writes()",
    )
    call_before(runner, "update_requests", then)


def relabel_rows(runner: Any, relabels: Any, group: int) -> None:
    """Stage new block ids of a group for the rows of the requests' slots.

    One kernel applies all staged writes of a step on the compute stream, after
    the gather of the step before and before that of this one, so steps in
    flight keep their ids. It writes all runs at once, in no order: they must
    not overlap. A relabel names blocks that the row has, new blocks are staged
    behind these; requests whose whole row is staged in this step are new ones,
    and a plan has no relabels for them. Relies on ``StagedWriteTensor.stage_write``,
    v1/worker/gpu/buffer_utils.py:201, and ``BlockTables.num_blocks``, block_table.py:71.
    """
    tables = runner.block_tables
    slots, known = runner.req_states.req_id_to_index, tables.num_blocks.np[group]
    for request_id, first, blocks in relabels:
        slot = slots.get(request_id)
        if slot is None:
            raise UnsupportedError(
                f"request {request_id} is not known to the model runner, though its blocks moved"
            )
        if first + len(blocks) > known[slot]:
            raise UnsupportedError(
                f"blocks {first} to {first + len(blocks)} of request {request_id} moved, but the "
                f"model runner knows {known[slot]} blocks of it"
            )
        tables.block_tables[group].stage_write(slot, first, blocks)


def forward_pass(runner: Any) -> Callable[[int], float]:
    """A function that times one pass of the V2 runner, for ``model_runner.forward_pass``.

    Relies on ``_dummy_run`` as ``profile_run`` calls it, v1/worker/gpu/model_runner.py:1004,
    and on ``compute_logits`` of what it returns, :971.
    """
    expect(
        type(runner).profile_run,
        "hidden_states, sample_hidden_states = self._dummy_run(",
        "skip_attn=True,\n            is_profile=True,",
        "torch.accelerator.synchronize()",
    )
    expect(type(runner)._dummy_sampler_run, "self.model.compute_logits(hidden_states)")

    def seconds(tokens: int) -> float:
        start = perf_counter()
        _, sample_hidden_states = runner._dummy_run(tokens, skip_attn=True, is_profile=True)
        with torch.inference_mode():
            runner.model.compute_logits(sample_hidden_states)
        torch.accelerator.synchronize()
        return perf_counter() - start

    return seconds

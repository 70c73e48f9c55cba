"""vLLM's own dispatchers of CUDA graphs, V1's and V2's, on runners that hold little else.

What they dispatch can be run too: FULL graphs are replayed by vLLM's own code, and note it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.compilation import cuda_graph
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

SIZES = [1, 2, 4, 8]
MOST_REQUESTS = 4

Dispatch = Callable[[int, int], Any]
"""The mode and padded tokens for so many tokens of so many requests."""

Run = Callable[[int, int], CUDAGraphMode]
"""Dispatches so many tokens of so many requests, and runs what came out."""


def config_of(mode: CUDAGraphMode) -> Any:
    """The part of a VllmConfig that both dispatchers look at."""
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE,
        cudagraph_mode=mode,
        cudagraph_capture_sizes=list(SIZES),
        max_cudagraph_capture_size=SIZES[-1],
    )
    compilation.set_splitting_ops_for_v1(all2all_backend="", data_parallel_size=1)
    assert compilation.splitting_ops_contain_kv_cache_update()
    return SimpleNamespace(
        compilation_config=compilation,
        num_speculative_tokens=0,
        lora_config=None,
        speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=MOST_REQUESTS),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )


def v1(mode: CUDAGraphMode) -> tuple[Any, Dispatch]:
    """A V1 runner with its dispatcher, asked as the runner asks it."""
    dispatcher = CudagraphDispatcher(config_of(mode))
    dispatcher.initialize_cudagraph_keys(mode)
    runner = SimpleNamespace(cudagraph_dispatcher=dispatcher)

    def dispatch(requests: int, tokens: int) -> Any:
        found, batch = runner.cudagraph_dispatcher.dispatch(
            num_tokens=tokens,
            has_lora=False,
            uniform_decode=requests == tokens,
            num_active_loras=0,
            valid_modes=None,
            invalid_modes=None,
        )
        return found, batch.num_tokens

    return runner, dispatch


def v2(mode: CUDAGraphMode, varlen: bool = False) -> tuple[Any, Dispatch]:
    """A V2 runner with its graph manager, asked through vLLM's own function."""
    manager = CudaGraphManager(
        config_of(mode), torch.device("cpu"), mode, decode_query_len=1, varlen_decode=varlen
    )
    manager._graphs_captured = True
    runner = SimpleNamespace(cudagraph_manager=manager, req_states=None)

    def dispatch(requests: int, tokens: int) -> Any:
        decodes = requests == tokens
        batch, _ = dispatch_cg_and_sync_dp(
            runner.cudagraph_manager,
            requests,
            tokens,
            1 if decodes else None,
            dp_size=1,
            dp_rank=0,
            max_query_len=1 if decodes else None,
        )
        return batch.cg_mode, batch.num_tokens

    return runner, dispatch


DRAFTS = 2
"""Draft tokens of a request in a step of ``v2_drafting``."""


def v2_drafting(mode: CUDAGraphMode) -> tuple[Any, Dispatch, Dispatch]:
    """A V2 runner with a drafter; how each is asked for a batch.

    Requests that decode have ``1 + DRAFTS`` tokens, for the drafter's first pass, too.
    """
    config = config_of(mode)
    config.num_speculative_tokens = DRAFTS

    def manager(kind: type[CudaGraphManager]) -> Any:
        made = kind(config, torch.device("cpu"), mode, decode_query_len=1 + DRAFTS)
        made._graphs_captured = True
        return made

    speculator: Any = object.__new__(EagleSpeculator)
    speculator.prefill_cudagraph_manager = manager(SpeculatorCudaGraphManager)
    runner = SimpleNamespace(
        cudagraph_manager=manager(CudaGraphManager), req_states=None, speculator=speculator
    )

    def asks(of: Callable[[], Any]) -> Dispatch:
        def dispatch(requests: int, tokens: int) -> Any:
            decodes = 1 + DRAFTS if tokens == requests * (1 + DRAFTS) else None
            batch, _ = dispatch_cg_and_sync_dp(
                of(), requests, tokens, decodes, dp_size=1, dp_rank=0
            )
            return batch.cg_mode, batch.num_tokens

        return dispatch

    return (
        runner,
        asks(lambda: runner.cudagraph_manager),
        asks(lambda: speculator.prefill_cudagraph_manager),
    )


class Graph:
    """A captured graph that only notes its replays."""

    def __init__(self, replays: list[str]) -> None:
        self._replays = replays

    def replay(self) -> None:
        self._replays.append("replay")


def v1_graphs(replays: list[str], mode: CUDAGraphMode) -> tuple[Any, Run]:
    """As ``v1``, with vLLM's wrapper around a model, all FULL graphs captured."""
    runner, _ = v1(mode)

    def model() -> None:
        replays.append("model")

    dispatcher = runner.cudagraph_dispatcher
    runner.model = model
    if mode.has_full_cudagraphs():
        config: Any = SimpleNamespace(compilation_config=dispatcher.compilation_config)
        runner.model = cuda_graph.CUDAGraphWrapper(model, config, CUDAGraphMode.FULL)
        for batch in dispatcher.cudagraph_keys[CUDAGraphMode.FULL]:
            entry = cuda_graph.CUDAGraphEntry(batch, Graph(replays))
            runner.model.concrete_cudagraph_entries[batch] = entry

    def run(requests: int, tokens: int) -> CUDAGraphMode:
        found, batch = runner.cudagraph_dispatcher.dispatch(
            num_tokens=tokens, uniform_decode=requests == tokens
        )
        context = ForwardContext({}, {}, {}, cudagraph_runtime_mode=found, batch_descriptor=batch)
        with override_forward_context(context):
            runner.model()
        return CUDAGraphMode(found)

    return runner, run


def v2_graphs(replays: list[str], mode: CUDAGraphMode) -> tuple[Any, Run]:
    """As ``v2``, all FULL graphs captured."""
    runner, _ = v2(mode)
    manager = runner.cudagraph_manager
    for batch in manager._capture_descs.get(CUDAGraphMode.FULL, ()):
        manager.graphs[batch] = Graph(replays)

    def run(requests: int, tokens: int) -> CUDAGraphMode:
        decodes = 1 if requests == tokens else None
        batch, _ = dispatch_cg_and_sync_dp(
            manager, requests, tokens, decodes, dp_size=1, dp_rank=0, max_query_len=decodes
        )
        if batch.cg_mode == CUDAGraphMode.FULL:
            manager.run_fullgraph(batch)
        else:
            replays.append("model")
        return batch.cg_mode

    return runner, run


def without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pipeline rank and no memory pool of graphs."""
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    for module in (cudagraph_utils, cuda_graph):
        monkeypatch.setattr(module, "current_platform", platform)

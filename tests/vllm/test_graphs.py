"""Steps that copy KV run no FULL CUDA graph; all other steps are dispatched as vLLM does.

vLLM's own dispatchers, V1's and V2's; only the capture, which needs a GPU, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm import compat, compat_graphs

pytestmark = pytest.mark.vllm

SIZES = [1, 2, 4, 8]
MOST_REQUESTS = 4

Dispatch = Callable[[int, int], Any]
"""The mode and padded tokens for so many tokens of so many requests."""


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
    manager = cudagraph_utils.CudaGraphManager(
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


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pipeline rank and no memory pool of graphs."""
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)


BATCHES = [(1, 1), (3, 3), (4, 4), (2, 7), (4, 8), (2, 9)]
"""Requests and tokens: decodes, mixed batches, one too large for a graph."""


@pytest.mark.parametrize("make", [v1, v2, lambda mode: v2(mode, varlen=True)])
def test_only_steps_that_copy_lose_their_full_graph(make: Callable[..., Any]) -> None:
    """They run the PIECEWISE graph of the same size, if there is one."""
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    runner, dispatch = make(mode)
    assert compat.is_v2(runner) == (make is not v1)
    before = [dispatch(*batch) for batch in BATCHES]
    assert [found for found, _ in before].count(CUDAGraphMode.FULL) == 3
    streaming = False
    compat_graphs.veto_full_graphs(runner, lambda: streaming)
    assert compat_graphs.graph_mode(runner) == mode
    assert [dispatch(*batch) for batch in BATCHES] == before
    streaming = True
    vetoed = [dispatch(*batch) for batch in BATCHES]
    for (was, size), (now, padded) in zip(before, vetoed, strict=True):
        assert padded == size
        assert now == (CUDAGraphMode.PIECEWISE if was == CUDAGraphMode.FULL else was)
    streaming = False
    assert [dispatch(*batch) for batch in BATCHES] == before


@pytest.mark.parametrize("make", [v1, v2])
@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE])
def test_modes_without_full_graphs_are_not_changed(make: Any, mode: CUDAGraphMode) -> None:
    """There is nothing to veto."""
    runner, dispatch = make(mode)
    before = [dispatch(*batch) for batch in BATCHES]
    compat_graphs.veto_full_graphs(runner, lambda: True)
    assert [dispatch(*batch) for batch in BATCHES] == before


def test_a_full_graph_that_cannot_be_vetoed_is_an_error() -> None:
    """V2 in mode FULL has graphs for any batch; such a mode is refused at start, too."""
    runner, dispatch = v2(CUDAGraphMode.FULL)
    compat_graphs.veto_full_graphs(runner, lambda: True)
    with pytest.raises(UnsupportedError, match="FULL CUDA graph"):
        dispatch(2, 2)

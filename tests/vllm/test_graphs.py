"""Steps that copy KV run no FULL CUDA graph; all other steps are dispatched as vLLM does.

vLLM's own dispatchers, V1's and V2's; only the capture, which needs a GPU, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm.compat import cuda_graphs, model_runner
from tests.helpers.graph_runners import DRAFTS, v1, v2, v2_drafting, without_device

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the helper says."""
    without_device(monkeypatch)


BATCHES = [(1, 1), (3, 3), (4, 4), (2, 7), (4, 8), (2, 9)]
"""Requests and tokens: decodes, mixed batches, one too large for a graph."""


@pytest.mark.parametrize("make", [v1, v2, lambda mode: v2(mode, varlen=True)])
def test_only_steps_that_copy_lose_their_full_graph(make: Callable[..., Any]) -> None:
    """They run the PIECEWISE graph of the same size, if there is one."""
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    runner, dispatch = make(mode)
    assert model_runner.is_v2(runner) == (make is not v1)
    before = [dispatch(*batch) for batch in BATCHES]
    assert [found for found, _ in before].count(CUDAGraphMode.FULL) == 3
    streaming = False
    cuda_graphs.veto_full_graphs(runner, lambda: streaming)
    assert cuda_graphs.graph_mode(runner) == mode
    assert [dispatch(*batch) for batch in BATCHES] == before
    streaming = True
    vetoed = [dispatch(*batch) for batch in BATCHES]
    for (was, size), (now, padded) in zip(before, vetoed, strict=True):
        assert padded == size
        assert now == (CUDAGraphMode.PIECEWISE if was == CUDAGraphMode.FULL else was)
    streaming = False
    assert [dispatch(*batch) for batch in BATCHES] == before


def test_a_drafters_first_pass_goes_as_the_models() -> None:
    """It reads the metadata of the model's batch, which are padded for a FULL graph or are not.

    It comes when the step has passed its last gate, so that the veto itself is over.
    """
    runner, model, first_pass = v2_drafting(CUDAGraphMode.FULL_AND_PIECEWISE)
    decodes = 2, 2 * (1 + DRAFTS)
    before = model(*decodes)
    assert before[0] == first_pass(*decodes)[0] == CUDAGraphMode.FULL
    streaming = False
    cuda_graphs.veto_full_graphs(runner, lambda: streaming)
    for streaming, mode in ((True, CUDAGraphMode.PIECEWISE), (False, CUDAGraphMode.FULL)):
        assert model(*decodes)[0] == mode
        streaming = not streaming
        assert first_pass(*decodes)[0] == mode


@pytest.mark.parametrize("make", [v1, v2])
@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE])
def test_modes_without_full_graphs_are_not_changed(make: Any, mode: CUDAGraphMode) -> None:
    """There is nothing to veto."""
    runner, dispatch = make(mode)
    before = [dispatch(*batch) for batch in BATCHES]
    cuda_graphs.veto_full_graphs(runner, lambda: True)
    assert [dispatch(*batch) for batch in BATCHES] == before


def test_a_full_graph_that_cannot_be_vetoed_is_an_error() -> None:
    """V2 in mode FULL has graphs for any batch; such a mode is refused at start, too."""
    runner, dispatch = v2(CUDAGraphMode.FULL)
    cuda_graphs.veto_full_graphs(runner, lambda: True)
    with pytest.raises(UnsupportedError, match="FULL CUDA graph"):
        dispatch(2, 2)

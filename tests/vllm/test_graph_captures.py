"""Captures of FULL CUDA graphs pass the gates of all layers, or the flag is refused.

vLLM's own lists of its graphs; its captures, which need a GPU, are passes through the gates here.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm.compat import cuda_graphs
from tests.helpers.graph_runners import v1_graphs, v2_graphs, without_device
from tests.helpers.noting_engine import LAYERS, STREAM, forward, in_place, opened, warm_up

pytestmark = pytest.mark.vllm

BOTH = CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.fixture(params=[v1_graphs, v2_graphs], ids=["v1", "v2"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runners of vLLM's two kinds."""
    without_device(monkeypatch)
    in_place(monkeypatch)
    return request.param


def test_each_capture_passes_all_gates(make: Any) -> None:
    """Between begin_capture with the stream and end_capture; what is not captured does nothing."""
    pie, engine = opened()
    runner, _ = make([], BOTH)
    pie.install_in_runner(runner, 0)
    capturing = False
    with pie.warm_up(runner, lambda: capturing, lambda: STREAM):
        forward(pie)
        assert engine.calls == []
        for _ in cuda_graphs.full_graphs(runner):
            engine.calls.clear()
            capturing = True
            assert not pie.needs_gates(), "vLLM's captures would be kept from their graphs"
            forward(pie)
            capturing = False
            assert engine.calls[0] == ("begin_capture", STREAM)
            assert engine.calls[1] == ("before_write", 0)
            assert engine.calls[-2:] == [("after_attention", LAYERS - 1), "end_capture"]
            assert len(engine.calls) == 3 * LAYERS + 2
    assert engine.calls[-1] == "zero_ring"
    assert pie._switch.engine is None


@pytest.mark.parametrize("fewer", [1, -1])
def test_graphs_that_do_not_pass_the_gates_refuse_the_flag(make: Any, fewer: int) -> None:
    """One of them was captured without, or there is one that vLLM does not hold."""
    pie, engine = opened()
    runner, _ = make(engine.calls, BOTH)
    pie.install_in_runner(runner, 0)
    count = len(cuda_graphs.full_graphs(runner))
    assert count == 3
    with pytest.raises(
        UnsupportedError, match=rf"{count - fewer} of {count}.*--no-pie-full-graphs"
    ):
        warm_up(pie, runner, count - fewer)


@pytest.mark.parametrize("call", ["begin_capture", "before_attention", "end_capture"])
@pytest.mark.parametrize("cuda_fails", [False, True])
def test_a_capture_that_fails_refuses_the_flag(make: Any, call: str, cuda_fails: bool) -> None:
    """The error is the engine's, also where the capture breaks because of it."""
    pie, engine = opened()
    runner, _ = make(engine.calls, BOTH)
    pie.install_in_runner(runner, 0)
    engine.fail = call

    def start() -> None:
        with pie.warm_up(runner, lambda: True, lambda: STREAM):
            forward(pie)
            if cuda_fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error")

    with pytest.raises(UnsupportedError, match=rf"{call} failed.*--no-pie-full-graphs"):
        start()
    assert pie._switch.engine is None
    assert engine.calls.count("end_capture") == (call != "begin_capture")


def test_a_capture_of_some_layers_only_is_ended(make: Any) -> None:
    """The engine must not stay in capture mode; it says what is missing."""
    pie, engine = opened()
    runner, _ = make(engine.calls, BOTH)
    pie.install_in_runner(runner, 0)
    capturing = True
    with suppress(UnsupportedError), pie.warm_up(runner, lambda: capturing, lambda: STREAM):
        forward(pie, LAYERS - 1)
        capturing = False
        forward(pie, 1)
        assert engine.calls[-1] == "end_capture"
        assert engine.calls.count("end_capture") == 1

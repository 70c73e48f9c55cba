"""Steps that load KV in FULL CUDA graphs: when, and in which order the engine is told.

vLLM's own dispatchers and replays, an engine that notes its calls.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from pie_vllm.engine import gather
from pie_vllm.engine.gather import GatherImage, NoGather
from pie_vllm.engine.link_calibration import UNMEASURED_CTAS
from pie_vllm.errors import GateError, TransferError, UnsupportedError
from pie_vllm.vllm.worker_side import full_graphs
from pie_vllm.vllm.worker_side.cache_engine import PieCacheEngine
from tests.helpers.graph_runners import v1_graphs, v2_graphs, without_device
from tests.helpers.noting_engine import (
    GEOMETRY,
    LAYERS,
    PLAN,
    STREAM,
    Engine,
    forward,
    in_place,
    opened,
    warm_up,
)

pytestmark = pytest.mark.vllm

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
DECODES, MIXED = (3, 3), (2, 7)


@pytest.fixture(params=[v1_graphs, v2_graphs], ids=["v1", "v2"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runners of vLLM's two kinds."""
    without_device(monkeypatch)
    in_place(monkeypatch)
    return request.param


def started(make: Any, full_graphs: bool = True) -> tuple[PieCacheEngine, Engine, Any]:
    """An engine in service: its calls, and how to run a batch, are empty and ready."""
    pie, engine = opened(full_graphs)
    runner, run = make(engine.calls, CUDAGraphMode.FULL_AND_PIECEWISE)
    pie.install_in_runner(runner, 0)
    warm_up(pie, runner)
    engine.calls.clear()
    return pie, engine, run


def test_a_step_that_fits_keeps_its_full_graph_and_is_told_before_it(make: Any) -> None:
    """begin_step, dispatch, enter, replay, end_step; and it counts."""
    pie, engine, run = started(make)
    for _ in range(2):
        with pie.step(PLAN, STREAM):
            assert run(*DECODES) == FULL
    assert engine.calls == 2 * [
        ("begin_step", PLAN.step, STREAM, True),
        "enter",
        "replay",
        "end_step",
    ]
    assert (pie.totals.steps, pie.totals.graph_steps) == (2, 2)
    assert pie.totals.gates == 2 * LAYERS
    assert pie.totals.stall_step == -1


def test_a_step_that_does_not_fit_runs_piecewise(make: Any) -> None:
    pie, engine, run = started(make)
    engine.fits = False
    with pie.step(PLAN, STREAM):
        assert run(*DECODES) == PIECEWISE
        forward(pie)
    assert "enter" not in engine.calls
    assert engine.calls[1:4] == ["model", ("before_write", 0), ("before_attention", 0)]
    assert (pie.totals.steps, pie.totals.graph_steps) == (1, 0)


def test_a_batch_that_has_no_full_graph_passes_the_gates(make: Any) -> None:
    """It might have had one by its plan; vLLM has none for such a batch."""
    pie, engine, run = started(make)
    with pie.step(PLAN, STREAM):
        assert run(*MIXED) == PIECEWISE
        forward(pie)
    assert "enter" not in engine.calls
    assert pie.totals.graph_steps == 0


def test_replays_outside_of_a_plan_do_not_open_a_step(make: Any) -> None:
    """Steps without a plan, and dummy runs, replay as in stock vLLM, before and after others."""
    pie, engine, run = started(make)
    for _ in range(2):
        with pie.step(None, STREAM):
            assert run(*DECODES) == FULL
        assert run(*DECODES) == FULL
        assert engine.calls == ["replay", "replay"]
        with pie.step(PLAN, STREAM):
            run(*DECODES)
        engine.calls.clear()


def test_a_full_graph_without_its_gates_is_an_error(make: Any) -> None:
    """One that vLLM launched for a step that does not fit, and one of which nobody was told."""
    pie, engine, run = started(make)
    engine.fits = False
    with pytest.raises(TransferError, match="does not fit"), pie.step(PLAN, STREAM):
        pie._graphs.before_replay()  # type: ignore[union-attr]
    assert engine.calls[-1] == "abort_step"
    engine.fits = True
    engine.calls.clear()
    with pytest.raises(GateError, match=f"0 of {LAYERS} layers"), pie.step(PLAN, STREAM):
        pass

    def twice() -> None:
        with pie.step(PLAN, STREAM):
            run(*DECODES)
            run(*DECODES)

    with pytest.raises(GateError, match="two FULL"):
        twice()
    assert engine.calls[-1] == "abort_step"
    with pie.step(PLAN, STREAM):
        run(*DECODES)
    assert pie.totals.graph_steps == 1


def test_a_launch_that_fails_aborts_the_step(make: Any) -> None:
    pie, engine, run = started(make)

    def fail() -> None:
        with pie.step(PLAN, STREAM):
            run(*DECODES)
            raise RuntimeError("no launch")

    with pytest.raises(RuntimeError, match="no launch"):
        fail()
    assert engine.calls[-1] == "abort_step"
    assert pie.totals.steps == 0
    assert not pie.needs_gates()


def test_without_the_flag_nothing_changes(make: Any) -> None:
    """Steps that load run piecewise, no capture passes the gates, no replay is told."""
    pie, engine, run = started(make, full_graphs=False)
    with pie.step(PLAN, STREAM):
        assert run(*DECODES) == PIECEWISE
        forward(pie)
    assert engine.calls[0] == ("begin_step", PLAN.step, STREAM, False)
    assert run(*DECODES) == FULL
    assert engine.calls[-1] == "replay"
    assert pie._graphs is None


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE])
def test_modes_without_full_graphs_are_only_told(make: Any, mode: CUDAGraphMode) -> None:
    """There is nothing to do, and no kernel is needed."""
    pie, engine = opened()
    runner, run = make(engine.calls, mode)
    pie.install_in_runner(runner, 0)
    warm_up(pie, runner)
    assert pie._graphs is None
    with pie.step(PLAN, STREAM):
        assert run(*DECODES) == mode
        forward(pie)
    assert ("begin_step", PLAN.step, STREAM, False) in engine.calls


def images(*found: GatherImage | NoGather) -> Any:
    """In place of ``gather_image``: the one compiled ahead, then the one compiled now."""

    def give(arch: str | None, *, ahead: bool = True) -> GatherImage | NoGather:
        assert arch == "sm_90"
        return found[0 if ahead else -1]

    return give


def test_a_device_without_the_kernel_refuses_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says why it is missing; an image for other devices is replaced by one for it."""
    engine: Any = Engine()
    monkeypatch.setattr(gather, "device_arch", lambda _: None)
    with pytest.raises(UnsupportedError, match=r"runs no kernels.*--no-pie-full-graphs"):
        full_graphs.use_graphs(engine)
    monkeypatch.setattr(gather, "device_arch", lambda _: "sm_90")
    ahead, now = GatherImage(b"ahead", "ahead"), GatherImage(b"now", "nvrtc")
    with pytest.raises(UnsupportedError, match="no compiler"):
        full_graphs.use_graphs(engine, images=images(NoGather("no compiler")))
    assert engine.calls == []
    full_graphs.use_graphs(engine, images=images(ahead))
    assert engine.calls == [("prepare", b"ahead", GEOMETRY.pooled_blocks, UNMEASURED_CTAS)]
    engine.fail = "prepare"
    with pytest.raises(UnsupportedError, match="prepare failed"):
        full_graphs.use_graphs(engine, images=images(now))
    with pytest.raises(UnsupportedError, match="prepare failed"):
        full_graphs.use_graphs(engine, images=images(ahead, NoGather("no compiler")))

"""vLLM's CUDA graphs: steps that copy KV must run the gates' Python.

A FULL graph replays without Python, so no gate runs, unless its capture passed them and the engine
is told of each replay (``worker_side/full_graphs.py``).

Read in vLLM 0.32.0 and 0.33.0; as in ``patching``, each line relied on is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import CUDAGraphMode

from pie_vllm.errors import UnsupportedError
from pie_vllm.vllm.compat import model_runner
from pie_vllm.vllm.compat.patching import expect


def veto_full_graphs(runner: Any, vetoed: Callable[[], bool]) -> None:
    """Keep FULL graphs from batches for which ``vetoed()`` holds; these run piecewise.

    All other batches are dispatched as in vLLM. The runner must have its KV cache: the V2 runner
    makes its graph manager with it. Drafters keep their own graphs, but for the first pass of a V2
    drafter behind a batch that lost its graph.
    """
    if model_runner.is_v2(runner):
        manager, veto = runner.cudagraph_manager, _Veto(vetoed)
        manager.dispatch = _veto_v2(manager, veto.asked)
        first_pass = _first_draft_pass(runner)
        if first_pass is not None:
            first_pass.dispatch = _veto_v2(first_pass, veto.was_vetoed)
    else:
        dispatcher = runner.cudagraph_dispatcher
        dispatcher.dispatch = _veto_v1(dispatcher, vetoed)


class _Veto:
    """Whether the newest batch of the model was vetoed, for what runs behind it."""

    def __init__(self, vetoed: Callable[[], bool]) -> None:
        """No batch came yet."""
        self._vetoed, self._newest = vetoed, False

    def asked(self) -> bool:
        """Whether the batch that is dispatched now is vetoed."""
        self._newest = self._vetoed()
        return self._newest

    def was_vetoed(self) -> bool:
        """What was answered last: the step may have passed its last gate meanwhile."""
        return self._newest


def _first_draft_pass(runner: Any) -> Any:
    """The graph manager of a V2 drafter's first pass; None where it has none.

    That pass reads the attention metadata and slots that the model's batch has, which are padded
    for a FULL graph only if the model ran one: v1/worker/gpu/model_states/default.py:181 and
    spec_decode/target_dependent_ar/speculator.py:258. vLLM runs both alike; under a veto, too, a
    FULL graph would write the drafter's KV to slots of an earlier step.
    """
    speculator: Any = getattr(runner, "speculator", None)
    manager = getattr(speculator, "prefill_cudagraph_manager", None)
    if manager is not None:
        expect(
            type(speculator).propose,
            "dispatch_cg_and_sync_dp(\n            self.prefill_cudagraph_manager,",
            "self.prefill_cudagraph_manager.run_fullgraph(prefill_batch_desc)",
        )
    return manager


def _veto_v1(dispatcher: Any, vetoed: Callable[[], bool]) -> Callable[..., Any]:
    """Veto by ``invalid_modes``, vLLM's own way to exclude a mode for a batch.

    Relies on ``allowed_modes -= invalid_modes``, v1/cudagraph_dispatcher.py:269, and on every
    graph of the runner coming from ``dispatch``: v1/worker/gpu_model_runner.py:3763.
    """
    expect(type(dispatcher).dispatch, "allowed_modes -= invalid_modes")
    dispatch = dispatcher.dispatch

    def without_full(*args: Any, invalid_modes: Any = None, **kwargs: Any) -> Any:
        if vetoed():
            invalid_modes = {CUDAGraphMode.FULL, *(invalid_modes or ())}
        return dispatch(*args, invalid_modes=invalid_modes, **kwargs)

    return without_full


def _veto_v2(manager: Any, vetoed: Callable[[], bool]) -> Callable[..., Any]:
    """Veto by asking for a graph as if the batch mixed prompts and decodes of any length.

    A FULL graph of a mode with a separate routine for decodes names one of the
    two, and then serves no such batch; a PIECEWISE graph names neither. Relies on
    ``_is_compatible``, v1/worker/gpu/cudagraph_utils.py:102, on the descriptors of
    ``_init_candidates``, :294 and :313, and on ``cudagraph_manager.dispatch(``, dp_utils.py:282.
    """
    from vllm.v1.worker.gpu import cudagraph_utils, dp_utils

    expect(
        cudagraph_utils._is_compatible,
        "desc.uniform_token_count is None\n"
        "            or desc.uniform_token_count == uniform_token_count",
        "desc.max_query_len is None\n"
        "            or (max_query_len is not None and desc.max_query_len >= max_query_len)",
    )
    expect(
        type(manager)._init_candidates,
        "uniform_token_count=decode_query_len,",
        "max_query_len=self.decode_query_len,",
    )
    expect(dp_utils.dispatch_cg_and_sync_dp, "batch_desc = cudagraph_manager.dispatch(")
    dispatch = manager.dispatch

    def without_full(
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not vetoed():
            return dispatch(
                num_reqs,
                num_tokens,
                uniform_token_count,
                num_active_loras,
                max_query_len=max_query_len,
                **kwargs,
            )
        found = dispatch(num_reqs, num_tokens, None, num_active_loras, max_query_len=None, **kwargs)
        if found.cg_mode == CUDAGraphMode.FULL:
            raise UnsupportedError(
                f"vLLM chose the FULL CUDA graph {found} for a step that copies KV; use "
                "--block-manager default."
            )
        return found

    return without_full


def full_graphs(runner: Any) -> list[Any]:
    """The FULL graphs that a runner has captured; it replays no others.

    V1 has them in a wrapper around the model, which captures and replays by
    ``entry.cudagraph`` (compilation/cuda_graph.py:323 and :347) and is put there by
    ``self.model = CUDAGraphWrapper(``, v1/worker/gpu_model_runner.py:5215. V2 has them in
    ``graphs`` of its manager, v1/worker/gpu/cudagraph_utils.py:451 and :511.
    """
    if model_runner.is_v2(runner):
        from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

        expect(CudaGraphManager.capture, "self.graphs[desc] = graph")
        expect(CudaGraphManager.run_fullgraph, "self.graphs[desc].replay()")
        return list(runner.cudagraph_manager.graphs.values())
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    expect(CUDAGraphWrapper.__call__, "entry.cudagraph = cudagraph", "entry.cudagraph.replay()")
    wrapper = runner.model
    if not isinstance(wrapper, CUDAGraphWrapper) or wrapper.runtime_mode != CUDAGraphMode.FULL:
        return []
    entries = wrapper.concrete_cudagraph_entries.values()
    return [entry.cudagraph for entry in entries if entry.cudagraph is not None]


def before_replay(graph: Any, then: Callable[[], None]) -> None:
    """Call ``then()`` before each replay of a graph, in the thread that launches it.

    The object's class becomes a subclass, as for ``gate.install``: a function put in place
    of its method would be a cycle, and keep the graph's memory until the next collection.
    """
    graph.__class__ = _announced(type(graph))
    graph._pie_then = then


_classes: dict[type, type] = {}


def _announced(base: type[Any]) -> type[Any]:
    if base in _classes:
        return _classes[base]

    class Announced(base):
        _pie_then: Callable[[], None]

        def replay(self) -> Any:
            self._pie_then()
            return super().replay()

    Announced.__name__ = Announced.__qualname__ = "Pie" + base.__name__
    _classes[base] = Announced
    return Announced


def graph_mode(runner: Any) -> Any:
    """The ``CUDAGraphMode`` that vLLM ended up with, which depends on the attention backend.

    Relies on ``resolve_cudagraph_mode_and_sizes``' result reaching
    ``ModelCudaGraphManager``, v1/worker/gpu/model_runner.py:720, and
    ``initialize_cudagraph_keys``, v1/worker/gpu_model_runner.py:6870.
    """
    owner = runner.cudagraph_manager if model_runner.is_v2(runner) else runner.cudagraph_dispatcher
    return owner.cudagraph_mode


def breakable_graphs() -> bool:
    """Whether vLLM captures KV writes in graphs that break at attention only.

    Relies on ``is_breakable_cudagraph_enabled``, compilation/breakable_cudagraph.py:54.
    """
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled

    return bool(is_breakable_cudagraph_enabled())

"""FULL CUDA graphs in vLLM on a CPU, over the stand-in for libcuda's own graphs.

They are captured by vLLM's own wrapper around the model, and replayed by it; see
tests/helpers/graph_device.py for what a replay computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from tests.helpers import cuda_on_cpu, standin
from tests.helpers.cuda_on_cpu import Touch
from tests.helpers.graph_device import Device, Graph, Model

SWITCH = "PIE_TEST_GRAPHS_ON_CPU"
"""In the environment: ``told``, or ``untold`` where the engine is not told of replays."""


def enable() -> None:
    """Make vLLM take its worker from here, if this process was asked to."""
    if not os.environ.get(SWITCH):
        return
    from pie_vllm.vllm import args, refusals

    args.WORKERS["cpu"] = "tests.helpers.graphs_on_cpu.GraphsOnCPUWorker"
    refusals.GRAPH_DEVICES = ("cpu",)


def __getattr__(name: str) -> Any:
    """The worker's class, made when a process asks for it: vLLM is not imported before."""
    if name != "GraphsOnCPUWorker":
        raise AttributeError(name)
    worker = globals()[name] = _worker_class()
    return worker


def _worker_class() -> type:
    from vllm.compilation import cuda_graph
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context
    from vllm.v1.worker.cpu_worker import CPUWorker

    from pie_vllm.vllm.worker_side import cache_engine, full_graphs
    from pie_vllm.vllm.worker_side.worker import PieWorkerMixin
    from tests.helpers.gather_kernel import GatherKernel, any_image

    cuda_on_cpu.prepare()
    GatherKernel(standin.load())
    replaced: Any = cache_engine, full_graphs.FullGraphs
    replaced[0].use_graphs = partial(full_graphs.use_graphs, images=any_image)
    if os.environ[SWITCH] == "untold":
        replaced[1].before_replay = _only_note

    class CPUWorkerWithGraphs(CPUWorker):
        """vLLM's CPU worker, as its GPU worker where graphs are concerned."""

        pie: Any
        device_of_graphs: Device

        def init_device(self) -> None:
            super().init_device()
            self.device_of_graphs = Device()

        def initialize_from_config(self, kv_cache_config: Any) -> None:
            self._take_device()
            super().initialize_from_config(kv_cache_config)
            self._dispatch_graphs()

        def _take_device(self) -> None:
            device = self.device_of_graphs
            numbers = cuda_on_cpu.mark_layers(self, device.around)
            device.without_gates = lambda: _swapped(self.pie._switch, "engine", None)
            layers = self.vllm_config.compilation_config.static_forward_context

            def touched() -> list[Touch]:
                context, found = get_forward_context(), []
                for name, number in numbers.items():
                    cache, window = layers[name].kv_cache, layers[name].impl.sliding_window
                    size = cuda_on_cpu.page_bytes(cache)
                    pages = cuda_on_cpu.written(cache, context.slot_mapping[name])
                    found.append(Touch(number, True, pages, size))
                    pages = cuda_on_cpu.read(cache, context.attn_metadata[name], window)
                    found.append(Touch(number, False, pages, size))
                return found

            self._make_graph = partial(Graph, device, touched)

        def _dispatch_graphs(self) -> None:
            """As the GPU runner does where a mode has both kinds of graphs."""
            runner: Any = self.model_runner
            most = self.scheduler_config.max_num_seqs
            sizes = list(range(1, most + 1))
            config = runner.compilation_config
            config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = sizes, most
            dispatcher = runner.cudagraph_dispatcher
            dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
            model = Model(runner.model, self.device_of_graphs)
            with _swapped(cuda_graph, "current_platform", _Platform):
                runner.model = cuda_graph.CUDAGraphWrapper(
                    model, self.vllm_config, CUDAGraphMode.FULL
                )

        def compile_or_warm_up_model(self) -> Any:
            found = super().compile_or_warm_up_model()
            runner: Any = self.model_runner
            with _torch_with(self._make_graph, self.device_of_graphs):
                for mode, batches in runner.cudagraph_dispatcher.get_capture_descs():
                    for batch in batches if mode == CUDAGraphMode.FULL else ():
                        runner._dummy_run(
                            batch.num_tokens,
                            cudagraph_runtime_mode=mode,
                            uniform_decode=True,
                            allow_microbatching=False,
                            skip_eplb=True,
                            is_graph_capturing=True,
                        )
            return found

        def shutdown(self) -> None:
            device = self.device_of_graphs
            device.forget_graphs()
            super().shutdown()

    class GraphsOnCPUWorker(PieWorkerMixin, CPUWorkerWithGraphs):
        """Pie's worker over the CUDA driver, on a device with graphs."""

        pie_device = "cpu"
        pie_driver = "cuda"
        pie_device_is_host = True

        def init_device(self) -> None:
            super().init_device()
            self.pie_granularity = cuda_on_cpu.driver_granularity()

        def pie_stream(self) -> int:
            return self.device_of_graphs.stream

        def pie_capturing(self) -> bool:
            return self.device_of_graphs.is_capturing

        def shutdown(self) -> None:
            super().shutdown()
            self.device_of_graphs.close()

    return GraphsOnCPUWorker


class _Platform:
    @staticmethod
    def get_global_graph_pool() -> None:
        return None


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _torch_with(make: Callable[[], Graph], device: Device) -> Iterator[None]:
    """What vLLM's wrapper around the model needs of CUDA's torch, while it captures."""
    import torch
    from vllm.compilation import cuda_graph

    def capture(graph: Graph, **_: Any) -> Any:
        return device.capture(graph)

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "CUDAGraph", make),
            (torch.cuda, "graph", capture),
            (cuda_graph, "capture_pool", lambda *_: nullcontext()),
            (cuda_graph, "current_stream", lambda: None),
            (cuda_graph, "weak_ref_tensors", lambda tensors: tensors),
            (cuda_graph, "validate_cudagraph_capturing_enabled", lambda: None),
        ):
            stack.enter_context(_swapped(owner, name, value))
        yield


def _only_note(graphs: Any) -> None:
    """In place of ``FullGraphs.before_replay``: the engine is not told."""
    graphs.entered = graphs._open

"""vLLM on a CPU over the CUDA driver: its memory and streams are the stand-in's for libcuda.

The model computes on the calling thread, which is the stand-in's default stream. Each layer tells
the stand-in, behind its gate, which pages it writes and reads, so that a copy that is not ordered
with them is found, whether or not it did harm.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

from tests.helpers import standin

SWITCH = "PIE_TEST_CUDA_ON_CPU"


def environment(report: Path, granularity: int = 4096) -> dict[str, str]:
    """Of a process that is to call ``enable``.

    Args:
        report: file that gets what the stand-in finds wrong, and what is live at the end.
        granularity: of mappings; CUDA's 2 MiB are much for small memory.
    """
    return {
        SWITCH: "1",
        standin.ENVIRONMENT: f"granularity={granularity},report={report}",
        "LD_LIBRARY_PATH": str(standin.library_folder()),
    }


def found_wrong(report: Path) -> list[str]:
    """What the processes reported: violations, and what was live when they ended."""
    lines = report.read_text().splitlines() if report.exists() else []
    return [line for line in lines if not re.fullmatch(r"process \d+|live:|violations:|", line)]


def enabled() -> bool:
    """Whether this process was asked to."""
    return bool(os.environ.get(SWITCH))


def enable() -> None:
    """Make vLLM take its worker from here, if this process was asked to."""
    if not enabled():
        return
    from pie_vllm.vllm import args

    args.WORKERS["cpu"] = "tests.helpers.cuda_on_cpu.CudaOnCPUWorker"


def report() -> dict[str, Any]:
    """What the stand-in saw in this process."""
    found = standin.load()
    return {
        "violations": found.violations(),
        "batches": found.calls("cuMemcpyBatchAsync"),
    }


def __getattr__(name: str) -> Any:
    """The worker's class, made when a process asks for it: vLLM is not imported before."""
    if name != "CudaOnCPUWorker":
        raise AttributeError(name)
    worker = globals()[name] = _worker_class()
    return worker


def _worker_class() -> type:
    import torch

    from pie_vllm.memory.arena import DeviceArena
    from pie_vllm.transfer.native import driver_granularity
    from pie_vllm.vllm.cpu_worker import PieCPUWorker

    standin.load()

    def tensor(arena: Any, device: Any = None) -> Any:  # noqa: ARG001
        """Device memory of the stand-in is host memory."""
        memory: Any = (ctypes.c_int8 * arena.size).from_address(arena.address)
        memory.owner = arena._owner
        return torch.frombuffer(memory, dtype=torch.int8)

    DeviceArena.tensor = tensor  # type: ignore[assignment,method-assign]

    class CudaOnCPUWorker(PieCPUWorker):
        """vLLM's CPU worker over the CUDA driver."""

        pie_driver = "cuda"

        def init_device(self) -> None:
            super().init_device()
            self.pie_granularity = driver_granularity("cuda")

        def initialize_from_config(self, kv_cache_config: Any) -> None:
            # Before the gates are put around it: what is marked lies inside them.
            context = self.vllm_config.compilation_config.static_forward_context
            for layer in context.values():
                if type(layer.impl).__name__.startswith("CPU"):
                    layer.impl.__class__ = _marked(type(layer.impl))
            super().initialize_from_config(kv_cache_config)

    return CudaOnCPUWorker


def _marked(base: Any) -> Any:
    """An attention implementation that names the pages it touches."""

    class Marked(base):
        def do_kv_cache_update(
            self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any
        ) -> Any:
            written = slots[slots >= 0] // kv_cache.shape[2]
            _touch(kv_cache, written.unique().tolist(), write=True)
            return super().do_kv_cache_update(layer, key, value, kv_cache, slots)

        def forward(
            self,
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            kv_cache: Any,
            metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if metadata is not None and kv_cache.numel():
                size = kv_cache.shape[2]
                read = {
                    block
                    for row, length in zip(metadata.block_table, metadata.seq_lens, strict=False)
                    for block in row[: -(-int(length) // size)].tolist()
                }
                _touch(kv_cache, sorted(read), write=False)
            return super().forward(layer, query, key, value, kv_cache, metadata, *args, **kwargs)

    Marked.__name__ = base.__name__
    return Marked


def _touch(kv_cache: Any, blocks: list[int], *, write: bool) -> None:
    page = kv_cache.stride(0) * kv_cache.element_size()
    for block in blocks:
        error = standin.load().access(0, kv_cache.data_ptr() + block * page, page, write=write)
        assert error == 0, f"block {block}: CUDA error {error}"

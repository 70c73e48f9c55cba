"""vLLM on a CPU over the CUDA driver: its memory and streams are the stand-in's for libcuda.

The model computes on the calling thread, which is the stand-in's default stream. Each layer tells
the stand-in, behind its gate, which pages it writes and reads, so that a copy that is not ordered
with them is found, whether or not it did harm.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers import standin

SWITCH = "PIE_TEST_CUDA_ON_CPU"


def environment(report: Path, granularity: int = PAGESIZE) -> dict[str, str]:
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
        "graphs": found.calls("cuGraphLaunch"),
    }


def __getattr__(name: str) -> Any:
    """The worker's class, made when a process asks for it: vLLM is not imported before."""
    if name != "CudaOnCPUWorker":
        raise AttributeError(name)
    worker = globals()[name] = _worker_class()
    return worker


def _worker_class() -> type:
    from pie_vllm.vllm.worker_side.cpu_worker import PieCPUWorker

    prepare()

    class CudaOnCPUWorker(PieCPUWorker):
        """vLLM's CPU worker over the CUDA driver."""

        pie_driver = "cuda"

        def init_device(self) -> None:
            super().init_device()
            self.pie_granularity = driver_granularity()

        def initialize_from_config(self, kv_cache_config: Any) -> None:
            mark_layers(self, null_stream)
            super().initialize_from_config(kv_cache_config)

    return CudaOnCPUWorker


def driver_granularity() -> int:
    """Of the CUDA driver."""
    from pie_vllm.engine import native

    return native.driver_granularity("cuda")


def prepare() -> None:
    """Load the stand-in, whose device memory torch can read."""
    import torch

    from pie_vllm.engine.arena import DeviceArena

    standin.load()
    if getattr(DeviceArena.tensor, "of_standin", False):
        return
    original = DeviceArena.tensor

    def tensor(arena: Any, device: Any = None) -> Any:
        """Device memory of the stand-in is host memory; all else as it was."""
        if arena.driver != "cuda" or arena._owner is None:
            return original(arena, device)
        memory: Any = (ctypes.c_int8 * arena.size).from_address(arena.address)
        memory.owner = arena._owner
        return torch.frombuffer(memory, dtype=torch.int8)

    tensor.of_standin = True  # type: ignore[attr-defined]
    DeviceArena.tensor = tensor  # type: ignore[assignment,method-assign]


class Touch(NamedTuple):
    """What a layer is about to do with its KV: ``pages`` are addresses of equal size."""

    layer: int
    write: bool
    pages: list[int]
    page_bytes: int


Around = Callable[[Touch], AbstractContextManager[None]]
"""Stands around a layer's KV write, and its attention."""


@contextmanager
def null_stream(touch: Touch) -> Iterator[None]:
    """The layers compute on the calling thread, which is the stand-in's default stream."""
    tell(0, touch)
    yield


def tell(stream: int, touch: Touch) -> None:
    """Tell the race check that work of a stream touches these pages now."""
    for page in touch.pages:
        error = standin.load().access(stream, page, touch.page_bytes, write=touch.write)
        assert error == 0, f"page {page:#x}: CUDA error {error}"


def mark_layers(worker: Any, around: Around) -> dict[str, int]:
    """Mark what lies inside the gates, which are put around the layers later.

    Returns:
        Numbers of the attention layers, by name.
    """
    from tests.helpers import mla_marks

    context = worker.vllm_config.compilation_config.static_forward_context
    attention = {n: layer for n, layer in context.items() if hasattr(layer, "attn_backend")}
    for number, layer in enumerate(attention.values()):
        if layer.attn_backend.is_mla():
            mla_marks.mark(layer.impl, number, around)
        elif type(layer.impl).__name__.startswith("CPU"):
            layer.impl.__class__ = _marked(type(layer.impl), number, around)
    return {name: number for number, name in enumerate(attention)}


def written(kv_cache: Any, slots: Any) -> list[int]:
    """Pages that a KV write of these slots touches."""
    blocks = slots[slots >= 0] // kv_cache.shape[2]
    return pages_of(kv_cache, blocks.unique().tolist())


def read(kv_cache: Any, metadata: Any, window: int = -1) -> list[int]:
    """Pages that attention with this metadata touches.

    What lies before a window is not read: its block may have another use.

    Args:
        kv_cache: of the layer.
        metadata: of the step.
        window: number of tokens that the layer looks back, its own included; -1 for all.
    """
    size, blocks = kv_cache.shape[2], set()
    queries = metadata.query_start_loc.diff().tolist()
    lengths = metadata.seq_lens.tolist()
    for row, length, new in zip(metadata.block_table, lengths, queries, strict=False):
        first = 0 if window < 0 else max(length - new - window + 1, 0)
        blocks.update(row[first // size : -(-length // size)].tolist())
    return pages_of(kv_cache, sorted(blocks))


def page_bytes(kv_cache: Any) -> int:
    """Of a block in one layer."""
    return int(kv_cache.stride(0) * kv_cache.element_size())


def pages_of(kv_cache: Any, blocks: list[int]) -> list[int]:
    """Addresses of these blocks in one layer."""
    return [kv_cache.data_ptr() + block * page_bytes(kv_cache) for block in blocks]


def _marked(base: Any, number: int, around: Around) -> Any:
    """An attention implementation that names the pages it touches."""

    class Marked(base):
        def do_kv_cache_update(
            self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any
        ) -> Any:
            pages = written(kv_cache, slots)
            with around(Touch(number, True, pages, page_bytes(kv_cache))):
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
            given = layer, query, key, value, kv_cache, metadata
            if metadata is None or not kv_cache.numel():
                return super().forward(*given, *args, **kwargs)
            pages = read(kv_cache, metadata, self.sliding_window)
            with around(Touch(number, False, pages, page_bytes(kv_cache))):
                return super().forward(*given, *args, **kwargs)

    Marked.__name__ = base.__name__
    return Marked

"""The servers of these tests: a float32 model whose KV mostly lies in the pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.shape import kv_shape, wide_ring
from tests.helpers.model import REPOSITORY
from tests.serving.process import Server
from tests.serving.traffic import SERVED_NAME

BLOCK_SIZE = 32
DEVICE_BLOCKS = 44
POOL_BLOCKS = 56
"""32 answers of 64 tokens grow to 128 blocks: more than both tiers, so that some preempt."""

RING_SLOTS = 2
MAX_MODEL_LEN = 512
WITHOUT_WHITESPACE = (
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}'
)
"""A grammar that allows whitespace lets a small model write nothing else until its last token."""

SOON_IDLE = "--additional-config.pie.pool_idle_seconds=2"
LOADED = ("--api-server-count=2", WITHOUT_WHITESPACE, SOON_IDLE)
"""Further arguments of the server under load."""

LOGS = REPOSITORY / "build" / "serving-tests"


def one_thread() -> pytest.MonkeyPatch:
    """Give the engine one thread until `undo()`: the cores are shared with the clients."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return patch


def make_server(model: Path, name: str, *more: str, pie: bool = True) -> Server:
    """A server that is not started yet, with its log under build/serving-tests."""
    shape = kv_shape(model, BLOCK_SIZE, "float32")
    arguments = [
        f"--served-model-name={SERVED_NAME}",
        f"--block-size={BLOCK_SIZE}",
        f"--max-model-len={MAX_MODEL_LEN}",
        f"--kv-cache-memory-bytes={DEVICE_BLOCKS * shape.block_bytes}",
        "--dtype=float32",
        "--enforce-eager",
        *more,
    ]
    if pie:
        sizes = wide_ring(shape, DEVICE_BLOCKS, POOL_BLOCKS, RING_SLOTS)
        arguments += ["--block-manager=pie", *sizes.server_options(shape)]
    return Server(model, arguments, LOGS / f"{name}.log")

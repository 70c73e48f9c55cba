"""Samples, while a server runs, how many KV blocks are in use and where their KV is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

SAMPLE_SECONDS = 0.5
"""Time between two samples: a page of metrics takes the server a few milliseconds."""


class BlockSample(NamedTuple):
    """Blocks at one time.

    Attributes:
        seconds: time since the sampling began.
        resident: blocks in use in device memory.
        pooled: blocks in use in CPU memory; 0 of stock vLLM.
        parked: blocks in CPU memory that no request uses now; 0 of stock vLLM.
    """

    seconds: float
    resident: float
    pooled: float
    parked: float


def block_sample(metrics: Mapping[str, float], device_blocks: int, seconds: float) -> BlockSample:
    """The blocks that a page of metrics tells of.

    Args:
        metrics: values by name, as `counters.parse_metrics` returns them.
        device_blocks: blocks of stock vLLM, its null block included; its metric is their share.
        seconds: time of the sample.
    """
    resident = metrics.get("vllm:pie_resident_blocks_used")
    if resident is None:
        return BlockSample(seconds, metrics["vllm:kv_cache_usage_perc"] * (device_blocks - 1), 0, 0)
    pooled, parked = (
        metrics.get(f"vllm:pie_{name}", 0.0) for name in ("pooled_blocks_used", "parked_blocks")
    )
    return BlockSample(seconds, resident, pooled, parked)


@contextmanager
def sampled_blocks(
    metrics: Callable[[], Mapping[str, float]], device_blocks: int
) -> Iterator[list[BlockSample]]:
    """A list that grows by a sample every SAMPLE_SECONDS until the block ends.

    A page that cannot be read ends the sampling, and is raised when the block ends.

    Args:
        metrics: reads the server's page of metrics.
        device_blocks: blocks of stock vLLM, its null block included.
    """
    samples: list[BlockSample] = []
    errors: list[Exception] = []
    done = threading.Event()
    begin = time.monotonic()

    def sample() -> None:
        try:
            while not done.is_set():
                seconds = time.monotonic() - begin
                samples.append(block_sample(metrics(), device_blocks, seconds))
                done.wait(SAMPLE_SECONDS)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=sample, name="block samples")
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]

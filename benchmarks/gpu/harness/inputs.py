"""Small copies on the compute stream, as a model runner makes for the inputs of each step."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.harness.compute import Compute

BYTES = 4096


class SmallCopies:
    """Copies a few KiB from pinned memory, and knows how long each took on the compute's clock.

    What a copy takes beyond its bytes is the time in which the device's copy engine did others.
    """

    def __init__(self, compute: Compute) -> None:
        """Nothing is copied yet."""
        self._compute = compute
        self._source = compute.pinned(BYTES)
        self._source.zero_()
        self._target = torch.zeros(BYTES, dtype=torch.int8, device=compute.device)
        self._marks: list[tuple[Any, Any]] = []

    def copy(self) -> None:
        """Submit one."""
        start = self._compute.mark()
        self._target.copy_(self._source, non_blocking=True)
        self._marks.append((start, self._compute.mark()))

    def take_seconds(self) -> list[float]:
        """Times of the copies since the last call; waits for them."""
        marks, self._marks = self._marks, []
        return [self._compute.seconds(start, end) for start, end in marks]

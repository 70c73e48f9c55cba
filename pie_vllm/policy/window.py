"""How many pooled blocks a link can make use of."""

from __future__ import annotations

import math

WINDOW_STEPS = 2.0
"""Steps whose loads the window holds."""


def blocks_fed(link_bytes_per_s: float, step_seconds: float, row_bytes: int) -> int:
    """Pooled blocks that a link can make use of: ``ceil(2 * link * step / row_bytes)``.

    Args:
        link_bytes_per_s: from the CPU to the device.
        step_seconds: of a step in which as many requests as may run decode, their attention
            left out, which takes time on top.
        row_bytes: of one block in all layers.
    """
    return max(1, math.ceil(WINDOW_STEPS * link_bytes_per_s * step_seconds / row_bytes))

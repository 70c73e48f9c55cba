"""How long a step that decodes takes with all its KV on the device, and what loads add to it.

A Kalman filter (R. E. Kalman, 1960) over ``base + requests + blocks + streaming + loads`` seconds,
each term a factor times its feature. The base drifts, as machines do; the other factors hardly:
that is how a load's cost is told from a machine that got slower. It is small and without a library
because it runs in the scheduler's step. Its constants are from simulated machines whose loads cost
nothing, a fixed time, or by the byte, with steps that scatter by 0 to 3 % (2026-11-23).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

OFTEN = 64
"""Number of steps learnt from one by one. After them one step in ``EVERY`` is, to spare the
scheduler's time, or one in ``CHANGED`` where the bytes loaded differ from the last step's: such
steps tell most about the cost of loads."""
EVERY = 8
CHANGED = 2

NOISE = 0.03
"""Initial standard deviation of what the model does not explain, as a fraction of a step's time."""
LEAST_NOISE = 0.005
MOST_NOISE = 0.1
NOISE_WEIGHT = 0.05
OUTLIER = 0.3
"""Largest error that counts in full, as a fraction of a step's time."""

LEAST_SHARE = 0.1
"""Least prediction, as a fraction of the last step learnt from."""

FAR_BELOW_MAX = 3
"""Number of steps in a row predicted below ``LEAST_SHARE`` of what they took after which the model
begins anew. An error counts as a fraction of the prediction, so it would learn from such steps for
hundreds of them: terms learnt from two requests say little of thirty."""

BASE_DRIFT = 0.1
"""Standard deviation of the base's drift per step, as a fraction of the noise. Some ten steps
determine the base, as in an average."""
OTHER_DRIFT = 1e-4
"""Standard deviation of the drift of each other term, as a fraction of a step's time."""
SHAPE_DOUBT = 0.5
"""Initial doubt about the terms of requests and blocks, as a fraction of a step's time."""
FIXED_DOUBT = 0.05
"""Initial doubt about the fixed cost of a step that loads, as a fraction of a step's time."""
LOAD_DOUBT = 0.05
"""Initial doubt about interference, as a fraction of the time that the link is busy."""

SURE = 1.5
"""Number of standard deviations above zero from which on a cost is taken for real."""


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    (a1, a2, a3, a4, a5), (b1, b2, b3, b4, b5) = a, b
    return a1 * b1 + a2 * b2 + a3 * b3 + a4 * b4 + a5 * b5


class LoadCost(NamedTuple):
    """What a step that streams takes longer, beyond the stall.

    Attributes:
        fixed: seconds of each such step.
        per_byte: seconds for each byte loaded.
    """

    fixed: float
    per_byte: float

    def seconds(self, loaded: int) -> float:
        """Of a step that loads so many bytes."""
        return self.fixed + self.per_byte * loaded if loaded else 0.0


FREE = LoadCost(0.0, 0.0)


class StepModel:
    """Learns from steps that only decode.

    Attributes:
        cost: what loads add, most likely.
        sure_cost: the same, of what is not likely to be chance.
    """

    def __init__(
        self,
        requests: int,
        blocks: int,
        bandwidth: float,
        compute: float,
        request_seconds: float = 0.0,
    ) -> None:
        """Begin with one step, whose requests and blocks are the units of their terms.

        Args:
            requests: that ran.
            blocks: of KV that they hold.
            bandwidth: of the link as far as known, bytes per second; the unit of loads.
            compute: seconds that the step took.
            request_seconds: of each request, as far as known.
        """
        self._begin(requests, blocks, bandwidth, compute, request_seconds)

    def _begin(
        self, requests: int, blocks: int, bandwidth: float, compute: float, request_seconds: float
    ) -> None:
        self._units = max(requests, 1), max(blocks, 1), bandwidth
        by_request = min(request_seconds * requests, compute)
        self._factors = [compute - by_request, by_request, 0.0, 0.0, 0.0]
        shape = SHAPE_DOUBT * compute
        doubts = (compute, shape, shape, FIXED_DOUBT * compute, LOAD_DOUBT)
        self._cov = [[d * d * (i == j) for j in range(5)] for i, d in enumerate(doubts)]
        self._most = [self._cov[i][i] for i in range(5)]
        self._scale = compute
        self._noise = NOISE**2
        self._steps = self._since = self._loaded = self._far_below = 0
        self.cost = self.sure_cost = FREE

    def seconds(self, requests: int, blocks: int) -> float:
        """Of a step that loads nothing."""
        base, by_request, by_block = self._factors[:3]
        unit_requests, unit_blocks, _ = self._units
        found = base + by_request * requests / unit_requests + by_block * blocks / unit_blocks
        return max(found, LEAST_SHARE * self._scale)

    def learn(self, requests: int, blocks: int, loaded: int, compute: float) -> bool:
        """Take a step into account, or pass it over; returns which.

        Args:
            requests: that ran.
            blocks: of KV that they hold.
            loaded: bytes.
            compute: seconds that it took, stall left out.
        """
        self._steps += 1
        self._since += 1
        if self._steps > OFTEN and self._since < (EVERY if loaded == self._loaded else CHANGED):
            return False
        since, self._since, self._loaded = self._since, 0, loaded
        unit_requests, unit_blocks, bandwidth = self._units
        x = (
            1.0,
            requests / unit_requests,
            blocks / unit_blocks,
            1.0 if loaded else 0.0,
            loaded / bandwidth,
        )
        factors = self._factors
        self._far_below = self._far_below + 1 if _dot(factors, x) < LEAST_SHARE * compute else 0
        if self._far_below >= FAR_BELOW_MAX:
            self._begin(requests, blocks, bandwidth, compute, 0.0)
            return True
        gain = [_dot(row, x) for row in self._cov]
        known, expected = _dot(gain, x), _dot(factors, x)
        scale = self._scale = max(expected, LEAST_SHARE * compute)
        most = OUTLIER * scale
        error = min(max(compute - expected, -most), most)
        if abs(error) == most:
            self._since = EVERY  # The next step tells whether this was chance.
        unit = scale * scale
        self._most[0] = max(self._most[0], unit)
        variance = known + self._noise * unit
        noise = self._noise + NOISE_WEIGHT * ((error * error - known) / unit - self._noise)
        self._noise = min(max(noise, LEAST_NOISE**2), MOST_NOISE**2)
        step = error / variance
        # Never clipped: what one factor may not have would pile up in those bound to it.
        self._factors = [f + g * step for f, g in zip(factors, gain, strict=True)]
        u, v, w, y, z = [g / variance for g in gain]
        self._cov = [
            [a - g * u, b - g * v, c - g * w, d - g * y, e - g * z]
            for (a, b, c, d, e), g in zip(self._cov, gain, strict=True)
        ]
        self._drift(unit, since)
        self._tell(bandwidth)
        return True

    def _drift(self, unit: float, steps: int) -> None:
        other = OTHER_DRIFT * OTHER_DRIFT * steps
        base = BASE_DRIFT * BASE_DRIFT * self._noise * steps
        wander = (base * unit, other * unit, other * unit, other * unit, other)
        for i, (row, more, most) in enumerate(zip(self._cov, wander, self._most, strict=True)):
            found = row[i] + more
            row[i] = found if found < most else most

    def _tell(self, bandwidth: float) -> None:
        fixed, load = self._factors[3:]
        self.cost = LoadCost(max(fixed, 0.0), max(load, 0.0) / bandwidth)
        sure_fixed = fixed if fixed > SURE * self._doubt(3) else 0.0
        sure_load = load if load > SURE * self._doubt(4) else 0.0
        self.sure_cost = LoadCost(sure_fixed, sure_load / bandwidth)

    def _doubt(self, i: int) -> float:
        """Standard deviation of a factor."""
        return sqrt(max(self._cov[i][i], 0.0))

"""Blocks that a step loads still lie together when everything was handed out many times over."""

from __future__ import annotations

import pytest

from benchmarks.simulated.gpu_machines import GEMM_SHARE, Machine, Model
from benchmarks.simulated.run_churn import Copies, Lengths, churn

_MODEL = Model(8, weight_bytes=0.018 * 3.7e12, flops_per_token=5e-5 * GEMM_SHARE * 1e15)
SMALL = Machine(
    "small",
    link=377e9,
    memory=3.7e12,
    flops=1e15,
    kv_bytes=500 * _MODEL.row_bytes,
    source="none: sizes of which the pool is full soon",
    model=_MODEL,
    store_link=297e9,
    pool_bytes=8200 * _MODEL.row_bytes,
)
LENGTHS = Lengths(prompts=(600, 1000), answers=(50, 200))
"""About 700 blocks in both tiers, for 8 to 10 chats; the pool is full after some 3,000 steps."""


@pytest.mark.parametrize(("parking", "mean_min"), [(True, 5.0), (False, 10.0)])
def test_runs_stay_long(parking: bool, mean_min: float) -> None:
    """With rows and ids from whoever was evicted, the mean run is below 2 with parking."""
    simulation = churn(SMALL, 6000, 1000, lengths=LENGTHS, parking=parking)
    windows = simulation.play()
    simulation.residency.check_integrity()
    last: Copies = windows[-1].loads
    assert last.blocks > 10_000, "the case has lost its point"
    assert last.mean >= mean_min

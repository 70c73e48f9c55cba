"""How much parked KV comes back in one step while others run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pie_vllm.policy.admission.restore import ParkedKey, restore, restore_part, restored_at_once
from tests.helpers.fakes import FakePool
from tests.helpers.parked_steps import copied, leave, make, take


@pytest.mark.parametrize(
    ("most", "loads", "expected"),
    [
        (100, 0, 100),
        (100, 60, 40),
        (100, 90, 25),
        (100, 500, 25),
        (3, 3, 1),
        (0, 0, 1),
        (None, 500, 64),
    ],
)
def test_what_pooled_blocks_leave_of_the_link(most: int | None, loads: int, expected: int) -> None:
    """A quarter of it at least, and one block; without a target, all there is room for."""
    residency: Any = SimpleNamespace(read_set=SimpleNamespace(num_blocks=loads), boundary=64)
    assert restored_at_once(residency, most) == expected


def full_pool() -> FakePool:
    """Rows for four: two parked long ago, two later; and what residents cache wants rows too."""
    pool = make(resident=4, pooled=1, rows=4)
    for name, contents in (("a", "xy"), ("b", "uv"), ("c", "pqr")):
        leave(pool, name, *contents)
    assert [pool.residency.parking.parked(key) for key in "xyuv"] == [True] * 4
    return pool


def test_what_is_left_of_a_prefix_is_not_given_up_meanwhile() -> None:
    """The page of its first block is taken from another, whose KV wants the row used least."""
    pool = full_pool()
    parking = pool.residency.parking
    restore_part(pool.residency, [ParkedKey("x"), ParkedKey("y")], 0, 1)
    plan = pool.residency.end_step({}, set(), True, None)
    assert len(copied(plan.stores)) == len(copied(plan.promotions)) == 1
    pool.residency.check_integrity()
    assert pool.cached["x"].ref_cnt == 0
    assert parking.has("y")
    assert sum(parking.parked(key) for key in "uv") == 1
    assert take(pool, "d", 1) is not None
    assert parking.has("y"), "it is as young as what came back"


def test_without_that_it_would_be() -> None:
    """The test above can fail."""
    pool = full_pool()
    restore(pool.residency, [ParkedKey("x")], 0, 1)
    assert not pool.residency.parking.parked("y")

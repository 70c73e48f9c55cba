"""The cost of submitting a step is that of its layers, and not of its pieces."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.submission import plan_of, run
from tests.helpers.standin import include_folder

pytestmark = pytest.mark.skipif(include_folder() is None, reason="no cuda.h")


def test_what_a_step_submits_each_way() -> None:
    """A copy of each piece in each layer; one of the table, and a launch in each layer."""
    small, large = (run(pieces, 5, 1, 0) for pieces in (40, 200))
    for found, pieces in ((small, 40), (large, 200)):
        engines, table = found["copy engines"], found["one table"]
        assert (engines["copies"], engines["launches"]) == (5 * pieces, 0)
        assert (table["copies"], table["launches"]) == (1, 5)
    assert small["one table"]["calls"] == large["one table"]["calls"]


@pytest.mark.alone
def test_the_thread_pays_for_descriptors() -> None:
    """0.5 us each, in every layer; of a table for one."""
    found = run(1142, 80, 3, 500)
    assert found["copy engines"]["ms"] >= 1142 * 80 * 0.5e-3
    assert found["one table"]["ms"] < found["copy engines"]["ms"] / 10


def test_no_two_pages_of_the_plan_are_one_run() -> None:
    """And each row is read once."""
    loads = plan_of(3, 1142, 8).loads
    assert loads is not None
    runs = loads.tolist()
    assert len({row for _, row, _ in runs}) == 1142
    pairs = itertools.pairwise(runs)
    assert not any(b == a + 1 and s == r + 1 for (a, r, _), (b, s, _) in pairs)

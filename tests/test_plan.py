"""Plans: they can be compared, and travel as they are."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

import numpy as np
import pytest

from pie_vllm.errors import IntegrityError
from pie_vllm.plan import NO_RUNS, Copy, PoolOrder, Relabel, StepOrders, StepPlan, num_copied, runs

LOADS = [Copy(10, 0, 2), Copy(14, 4, 1)]


def make(**changes: Any) -> StepPlan:
    """A plan that loads, with these fields instead."""
    moved = (Relabel("a", 3, (14,)),)
    return StepPlan(5, NO_RUNS, runs([Copy(1, 2, 1)]), runs(LOADS), moved, True, 3)._replace(
        **changes
    )


def test_plans_of_equal_content_are_equal() -> None:
    """Whatever arrays they hold; so are orders with them, as a tuple compares its fields."""
    one, other = make(), make()
    assert one.loads is not other.loads
    assert one == other
    assert (one != other) is False
    assert StepOrders(one, PoolOrder(1)) == StepOrders(other, PoolOrder(1))
    assert make(loads=None) == make(loads=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 6},
        {"stores": runs([Copy(1, 3, 1)])},
        {"promotions": NO_RUNS},
        {"loads": None},
        {"loads": runs(LOADS[:1])},
        {"loads": runs([LOADS[0], Copy(14, 5, 1)])},
        {"relabels": ()},
        {"forward": False},
        {"pooled": 4},
    ],
    ids=str,
)
def test_plans_that_differ_in_any_field_differ(changes: dict[str, Any]) -> None:
    """One number of one run is enough, and 'as before' equals no runs."""
    for one, other in ((make(), make(**changes)), (make(**changes), make())):
        assert one != other
        assert (one == other) is False
        assert StepOrders(one, PoolOrder(1)) != StepOrders(other, PoolOrder(1))
    assert make() != tuple(make())
    assert StepOrders(make(), PoolOrder(1)) != StepOrders(None, PoolOrder(1))


def test_a_plan_is_the_same_after_pickling() -> None:
    """With its arrays as the engine wants them, and read-only still."""
    loads = runs(Copy(2 * i, i, 1) for i in range(10_000))
    plan = make(loads=loads)
    blob = pickle.dumps(plan, pickle.HIGHEST_PROTOCOL)
    assert len(blob) < loads.nbytes + 1_000
    found = pickle.loads(blob)
    assert found == plan
    for name in ("stores", "promotions", "loads"):
        array = getattr(found, name)
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert not array.flags.writeable


@pytest.mark.parametrize("plan", [None, make()], ids=["idle", "plan"])
def test_orders_travel_under_one_name(plan: StepPlan | None) -> None:
    """Each class or function that a pickle names is imported again at both ends, every step."""
    orders = StepOrders(plan, PoolOrder(3, idle=True, number=2), 7, within_budget=False)
    blob = pickle.dumps(orders, pickle.HIGHEST_PROTOCOL)
    assert [op.name for op, *_ in pickletools.genops(blob)].count("STACK_GLOBAL") == 1
    found = pickle.loads(blob)
    assert found == orders
    assert type(found.pool) is PoolOrder
    assert plan is None or type(found.plan.relabels[0]) is Relabel


def test_runs_have_three_columns_also_without_any() -> None:
    """Nothing copied counts as no blocks."""
    assert NO_RUNS.shape == runs([]).shape == (0, 3)
    assert num_copied(NO_RUNS) == 0
    assert num_copied(runs(LOADS)) == 3
    with pytest.raises(ValueError, match="read-only"):
        runs(LOADS)[0, 0] = 3


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1])
def test_numbers_beyond_64_bits_are_not_cut(number: int) -> None:
    """They name nothing that there is."""
    with pytest.raises(IntegrityError, match="64 bits"):
        runs([Copy(0, number, 1)])

"""What the engine takes for the runs of a plan, and what it refuses by name."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from pie_vllm.engine.native import PlanArrays
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import IntegrityError
from pie_vllm.plan import NO_RUNS, Copy, StepPlan, runs
from tests.engine.driving import View, plan, run_step

GOOD = runs([Copy(8, 0, 1), Copy(9, 2, 1)])

BAD: dict[str, Any] = {
    "tuple": (Copy(8, 0, 1),),
    "list": [],
    "int32": GOOD.astype(np.int32),
    "float64": GOOD.astype(np.float64),
    "other byte order": GOOD.astype(">i8"),
    "flat": GOOD.ravel(),
    "two columns": np.ascontiguousarray(GOOD[:, :2]),
    "four columns": np.zeros((2, 4), np.int64),
    "one dimension more": GOOD[None],
    "every second run": np.repeat(GOOD, 2, axis=0)[::2],
    "column by column": np.asfortranarray(GOOD),
    "columns of a wider array": np.zeros((2, 6), np.int64)[:, :3],
}


@pytest.mark.parametrize("kind", ["stores", "promotions", "loads"])
@pytest.mark.parametrize("bad", BAD)
def test_other_arrays_are_refused_by_name(engine: TransferEngine, kind: str, bad: str) -> None:
    """Their memory is no list of runs; nothing is submitted, and the engine goes on."""
    wrong = plan(1)._replace(**{kind: BAD[bad]})
    for call in (engine.begin_step, engine.run_idle):
        with pytest.raises(IntegrityError, match=f"plan whose {kind} are"):
            call(wrong)
    view = View(engine)
    view.write_row(0, 5)
    seen = []
    step = plan(1, loads=((8, 0, 1),))
    run_step(engine, step, attend=lambda layer: seen.append(view.holds(layer, 8, 5)))
    assert seen == [True] * engine.geometry.num_layers


def test_nothing_is_copied_and_the_arrays_live_as_long() -> None:
    """The structure names the arrays' own memory."""
    loads = np.array(GOOD)
    address = loads.ctypes.data
    arrays = PlanArrays(StepPlan(1, NO_RUNS, GOOD, loads, (), forward=True))
    alive = weakref.ref(loads)
    del loads
    gc.collect()
    assert alive() is not None
    struct = arrays.struct
    assert (struct.loads, struct.num_loads) == (address, 2)
    assert (struct.promotions, struct.num_promotions) == (GOOD.ctypes.data, 2)
    assert struct.num_stores == 0
    assert struct.stores, "a list without runs has an address, too"
    assert PlanArrays(StepPlan(1, NO_RUNS, GOOD, None, (), forward=True)).struct.num_loads == -1

"""Scheduler's and worker's half of the pool together, over a real engine, with late steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import IntegrityError
from pie_vllm.plan import PoolOrder, PoolState, StepPlan
from pie_vllm.policy.control.elastic_pool import ElasticPool
from tests.engine.driving import View, plan, run_step

IDLE = 0.1
LATE = 4 * IDLE
TAG = 7

pytestmark = pytest.mark.alone


class Both:
    """Orders as the scheduler gives them, carried out as the worker does."""

    def __init__(self, engine: TransferEngine) -> None:
        self.engine = engine
        self.view = View(engine)
        chunk_rows = engine.geometry.chunk_rows
        self.keeper = PoolKeeper(engine, chunk_rows, idle_seconds=IDLE)
        self.pool = ElasticPool(engine.geometry, 1, lambda: 1 << 40, time.monotonic, IDLE)

    def plan(self, held: int, *, idle: bool = False) -> PoolOrder:
        """The order of a step, of which no memory was given back before."""
        assert not self.pool.begin_step(held)
        return self.pool.end_step(held, changed=True, idle=idle)

    def run(
        self, step: StepPlan | None, order: PoolOrder, write: Callable[[int], None] | None = None
    ) -> PoolState:
        """What ``PieWorkerMixin.execute_model`` does."""
        if step is not None:
            self.keeper.prepare(step.stores, step.promotions, step.loads)
            run_step(self.engine, step, write=write)
        self.keeper.follow(order)
        state = self.keeper.state
        self.pool.report(state)
        return state

    def store(self) -> None:
        """The KV of block 1 is stored to row 12, in the third chunk, and then lost."""
        self.view.write_all(1, TAG)
        order = self.plan(2)
        self.run(None, order)
        deadline = time.monotonic() + 10
        while self.pool.usable < 3:
            assert time.monotonic() < deadline
            self.pool.report(self.keeper.state)
        self.run(plan(1, stores=((1, 12, 1),)), self.plan(3))
        self.view.write_all(2, 0)


@pytest.fixture
def both(make_engine: Callable[..., TransferEngine]) -> Iterator[Both]:
    """Four chunks of five rows, of which the first is there."""
    found = Both(make_engine(chunks=1, rows=20))
    found.store()
    yield found
    found.keeper.close()


RESTORE = plan(2, promotions=((2, 12, 1),))


def test_a_late_step_finds_its_rows(both: Both) -> None:
    """Planned while requests ran: whatever the worker's clock says."""
    order = both.plan(3)
    time.sleep(LATE)
    both.run(RESTORE, order)
    both.engine.drain()
    assert all(both.view.holds(layer, 2, TAG) for layer in range(6))


def test_a_long_step_keeps_its_rows(both: Both) -> None:
    """Longer than the idle time, with layers to come whose copies are not submitted yet."""
    both.run(RESTORE, both.plan(3), lambda layer: time.sleep(LATE if layer == 0 else 0))
    both.engine.drain()
    assert all(both.view.holds(layer, 2, TAG) for layer in range(6))


def test_what_went_while_a_step_was_queued_is_known_to_be_gone(both: Both) -> None:
    """The step that asks is late; its report says so."""
    both.run(None, both.plan(3, idle=True))
    asking = both.plan(3)
    assert both.pool.paused(short=False)
    time.sleep(LATE)
    assert both.run(None, asking).released == 1
    assert both.pool.begin_step(3), "the row is gone"
    with pytest.raises(IntegrityError, match="row 12"):
        both.run(RESTORE, asking)


def test_what_was_asked_for_in_time_is_kept(both: Both) -> None:
    """The leave is taken back, and the row is there."""
    both.run(None, both.plan(3, idle=True))
    both.run(None, both.plan(3))
    time.sleep(LATE)
    both.run(RESTORE, both.plan(3))
    both.engine.drain()
    assert all(both.view.holds(layer, 2, TAG) for layer in range(6))

"""Steps over the policy alone in which KV is parked and comes back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pie_vllm.geometry import Geometry
from pie_vllm.policy.admission.restore import restore
from pie_vllm.policy.placement.interfaces import GroupBeside
from pie_vllm.policy.pool.parked_kv import Parking
from pie_vllm.policy.pool.rows import RowLedger
from tests.helpers.fakes import FakePool


def make(
    resident: int = 8,
    pooled: int = 2,
    rows: int = 8,
    policy: str | None = "lru",
    *,
    preempted_only: bool = False,
) -> FakePool:
    """A pool of these sizes; ``preempted_only`` as where a model has a group beside the pooled."""
    beside = [GroupBeside(1, {}, lambda _: range(0))] if preempted_only else []
    return FakePool(Geometry(2, 4096, resident, pooled, 1, rows, rows, 4096), policy, beside)


def leave(pool: FakePool, name: str, *contents: Any) -> None:
    """A request fills blocks with these contents in a step of its own, and ends."""
    pool.tables[name] = []
    pool.residency.admit(name)
    assert pool.allocate(name, len(contents))
    pool.residency.admitted(name)
    pool.residency.computed_again(name, len(contents))
    pool.residency.end_step({name: 1}, {name}, True, None)
    for block, content in zip(pool.tables[name], contents, strict=True):
        block.block_hash = content
        pool.cached[content] = block
    pool.free(name)


def take(pool: FakePool, name: str, count: int) -> Any:
    """A request takes new blocks in a step; returns its plan."""
    pool.tables[name] = []
    pool.residency.admit(name)
    assert pool.allocate(name, count)
    pool.residency.admitted(name)
    plan = pool.residency.end_step({name: 1}, {name}, True, None)
    pool.residency.check_integrity()
    return plan


def copied(runs: Any) -> list[tuple[int, int]]:
    """Block and row of each copy."""
    return [(block + i, row + i) for block, row, count in runs.tolist() for i in range(count)]


def come_back(
    pool: FakePool,
    name: str,
    found: list[Any],
    residents: int,
    new: int = 1,
    meanwhile: Callable[[], bool] = lambda: True,
) -> Any:
    """A request is admitted with hits, some parked; returns the plan of its step.

    ``meanwhile`` must hold in the step, after the admission.
    """
    hits = restore(pool.residency, found, 0, residents)
    pool.tables[name] = []
    pool.residency.admit(name, len(hits))
    pool.hit(name, hits)
    assert pool.allocate(name, new)
    pool.residency.admitted(name)
    pool.residency.check_integrity()
    assert meanwhile()
    pool.residency.computed_again(name, len(hits))
    plan = pool.residency.end_step({name: 1}, {name}, True, None)
    pool.residency.check_integrity()
    return plan


def parking_of(rows: int, *, distinct: bool = False) -> tuple[RowLedger, Parking]:
    """Parking over rows alone; pooled ids are 10 and above."""
    ledger = RowLedger(rows, 10)
    return ledger, Parking(ledger, rows, "lru", distinct=distinct)


def block(block_id: int, key: str | None) -> SimpleNamespace:
    """A cached block, or one that is not full."""
    return SimpleNamespace(block_id=block_id, block_hash=key)

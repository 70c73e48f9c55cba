"""What every step plan must say, worked out anew from the block tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pie_vllm.plan import NO_RUNS, Runs, StepPlan
from pie_vllm.policy.block import BlockId
from pie_vllm.policy.placement.residency import Residency


class PlanCheck:
    """Checks each plan against the tables as they are when it is made."""

    def __init__(self, residency: Residency, boundary: int, chunk_rows: int) -> None:
        """Before the first step; ids from ``boundary`` on are pooled."""
        self._residency = residency
        self._boundary = boundary
        self._chunk_rows = chunk_rows
        self._loads = NO_RUNS
        self._stored: set[int] = set()
        self._step = 0

    def check(self, plan: StepPlan | None, scheduled: Iterable[str]) -> None:
        """Assert that the plan loads what is read, stores what is kept, and that rows read hold KV.

        A row that the step stores to is read by loads alone, which come after the stores;
        promotions and what is restored read rows that an earlier step stored to. A row that was
        free since holds nothing.

        Args:
            plan: of the step just scheduled.
            scheduled: the requests that run in it.
        """
        wanted = self._wanted(scheduled)
        owned: set[int] = {self._residency.rows.row_of(b) for b in self._holding()}
        owned |= self._residency.parking.rows()
        if plan is None:
            assert not wanted, "a step reads pooled blocks and has no plan"
            self._stored &= owned
            return
        if plan.loads is None:
            follows = plan.step == self._step + 1
            assert follows or not len(self._loads), "loads 'as before' after a step without a plan"
        else:
            self._loads = plan.loads
        assert plan.step > self._step
        self._step = plan.step
        assert self._pairs(self._loads) == wanted, "the loads are not what the step reads"
        stores, promotions = self._pairs(plan.stores), self._pairs(plan.promotions)
        assert all(block < self._boundary for block in (*stores, *promotions))
        rows = [*stores.values(), *promotions.values()]
        assert len(set(rows)) == len(rows), "a row is named twice"
        assert self._stored >= set(promotions.values()), "a row is read that holds no KV"
        self._stored |= set(stores.values())
        assert self._stored >= set(wanted.values()), "a row is loaded that holds no KV"
        assert owned >= set(stores.values()), "a row that nobody owns is stored to"
        self._stored &= owned

    def _wanted(self, scheduled: Iterable[str]) -> dict[int, int]:
        ids = {b.block_id for r in scheduled for b in self._residency.tables[r]}
        row_of = self._residency.rows.row_of
        return {i: row_of(i) for i in ids if i >= self._boundary}

    def _holding(self) -> list[BlockId]:
        pooled = self._residency.blocks[self._boundary :]
        return [b.block_id for b in pooled if self._residency.rows.holds(b.block_id)]

    def _pairs(self, runs: Runs) -> dict[int, int]:
        pairs: dict[int, int] = {}
        for block, row, count in runs.tolist():
            assert row // self._chunk_rows == (row + count - 1) // self._chunk_rows
            for i in range(count):
                assert block + i not in pairs, "a block is named twice"
                pairs[block + i] = row + i
        return pairs


def plan_check(manager: Any) -> PlanCheck:
    """For a scheduler's block manager."""
    geometry = manager.geometry
    return PlanCheck(manager.residency, geometry.resident_blocks, geometry.chunk_rows)

"""The plan of each step, made of what placement and parking have collected for it."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence

from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS, StepPlan
from pie_vllm.policy.block import Block, BlockId, RequestId, Row
from pie_vllm.policy.placement.free_queue import TieredFreeBlockQueue
from pie_vllm.policy.placement.read_set import ReadSet
from pie_vllm.policy.placement.relabel_log import RelabelLog
from pie_vllm.policy.placement.row_supply import RowSupply
from pie_vllm.policy.placement.run_set import merge
from pie_vllm.policy.pool.parked_kv import Parking


class StepPlanner:
    """Numbers the steps, and builds the plan of each.

    A plan has the stores and restores of ``Parking``, the promotions that it is given, the loads of
    the ``ReadSet`` and the relabels. It says, too, where copies and work on pages without a gate
    must be kept apart.

    Attributes:
        step: Number of the newest step that was planned, with a plan or without.
        relabels: New block ids in tables that the workers hold.
    """

    def __init__(
        self,
        geometry: Geometry,
        queue: TieredFreeBlockQueue,
        parking: Parking,
        read_set: ReadSet,
        supply: RowSupply,
        *,
        shared: bool,
    ) -> None:
        """Start before the first step.

        Args:
            geometry: Sizes of both tiers.
            queue: Free blocks of both tiers.
            parking: KV that no request uses, whose copies go with the step.
            read_set: Pooled blocks that the step loads.
            supply: Told when the step's copies have given rows back.
            shared: Whether groups of layers without a pool take residents, too.
        """
        self._window, self._chunk_rows = geometry.pooled_blocks, geometry.chunk_rows
        self._queue, self._parking, self._read_set = queue, parking, read_set
        self._supply, self._shared = supply, shared
        self._without_gate: set[BlockId] = set()
        self.relabels = RelabelLog()
        self.step = 0

    def written_without_gate(self, blocks: Iterable[Block]) -> None:
        """These residents, new in this step, are written to without regard to copies."""
        self._without_gate.update(block.block_id for block in blocks)

    def next_step(self) -> int:
        """The number of the step that is planned now."""
        self.step += 1  # Steps without a plan count: the engine must notice the gap.
        return self.step

    def pass_step(self) -> None:
        """After a step that copies and moves nothing, while no request has pooled blocks."""
        self.next_step()
        self._without_gate.clear()

    def plan(
        self,
        promoted: Sequence[tuple[BlockId, Row]],
        holders: Container[RequestId],
        fresh: Collection[RequestId],
        forward: bool,
    ) -> StepPlan | None:
        """The plan of the step; None when there is nothing to do.

        Args:
            promoted: Resident page to fill and row to fill it from, of each block promoted.
            holders: Requests that hold blocks.
            fresh: Requests whose whole table is sent to the workers; they need no relabels.
            forward: Whether the model runs.
        """
        read_set, parking = self._read_set, self._parking
        stores = promotions = NO_RUNS
        stores_first = stores_beside = fills_beside = False
        if parking.pending:
            beside = parking.copies.stores_beside, parking.copies.fills_beside
            stored, restored = parking.take()
            stores_beside, fills_beside = beside[0] and bool(stored), beside[1] and bool(restored)
            without_gate = self._without_gate
            stores_first = bool(without_gate) and any(page in without_gate for page, _ in stored)
            self._supply.withhold()
            stores = merge(stored, self._chunk_rows)
            promotions = merge([*promoted, *restored], self._chunk_rows)
        self._without_gate.clear()
        relabels = self.relabels.drain(holders, fresh) if self.relabels.ids else ()
        if not (len(stores) or len(promotions) or relabels or read_set.num_blocks):
            return None
        loads, pooled = read_set.take(), self._window - self._queue.free_pooled
        after_all = self._shared and len(promotions) > 0
        return StepPlan(
            self.step,
            stores,
            promotions,
            loads,
            relabels,
            forward,
            pooled,
            stores_first,
            after_all,
            stores_beside,
            fills_beside,
        )

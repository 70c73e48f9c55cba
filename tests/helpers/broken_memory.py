"""Memory of the tag-writing runner whose copies are wrong on purpose."""

from __future__ import annotations

from typing import Any

from pie_vllm.plan import NO_RUNS, Copy, Runs, runs
from tests.helpers.tagrunner import DictMemory


class SkipsStores(DictMemory):
    """Rows do not get what is stored to them."""

    def run(self, plan: Any, work: Any) -> None:
        """Run a step."""
        super().run(plan and plan._replace(stores=NO_RUNS), work)


class SkipsPromotions(DictMemory):
    """Pages that are promoted or restored are not filled."""

    def run(self, plan: Any, work: Any) -> None:
        """Run a step."""
        super().run(plan and plan._replace(promotions=NO_RUNS), work)


class RestoresWrongRows(DictMemory):
    """Pages that are restored get the row of another block."""

    def run(self, plan: Any, work: Any) -> None:
        """Run a step."""
        super().run(plan and plan._replace(promotions=self._wrong(plan)), work)

    def _wrong(self, plan: Any) -> Runs:
        stored = {row + i for _, row, count in plan.stores.tolist() for i in range(count)}
        held = [r for r in range(self.chunks * self.chunk_rows) if r not in stored]
        return runs(
            Copy(block + i, held[(held.index(row + i) + 1) % len(held)], 1)
            for block, row, count in plan.promotions.tolist()
            for i in range(count)
        )

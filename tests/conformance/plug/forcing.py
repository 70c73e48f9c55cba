"""Steps in which every block that can be demoted is, at the capacity of stock."""

from __future__ import annotations

from typing import Any

from sizes import MODE


class Forcing:
    """Demotes all that can be, and takes the pages it frees out of circulation.

    A page stays out as long as the pooled id is in use: capacity is stock's, ids are not.
    """

    def __init__(self, manager: Any) -> None:
        self._residency = residency = manager.residency
        self._manager = manager
        self._queue = queue = residency.queue
        self._out: list[Any] = []
        self._append_n, self._prepend_n = queue.append_n, queue.prepend_n
        self._remove, self._give_blank = queue.remove, queue.give_blank
        queue.append_n, queue.prepend_n = self.append_n, self.prepend_n
        queue.remove, queue.give_blank = self.remove, self.give_blank
        residency.begin_step = lambda *_, **__: None
        if MODE == "forced":
            end_step = residency.end_step

            def end_without_promotion(
                scheduled: Any, fresh: Any, forward: Any, _headroom: Any, *rest: Any
            ) -> Any:
                return end_step(scheduled, fresh, forward, None, *rest)

            residency.end_step = end_without_promotion

    def demote_all(self) -> None:
        """Before a step."""
        residency, queue = self._residency, self._queue
        queue.frozen = False
        queue.refresh()
        self._manager.residency.catch_up()
        before = residency.demotions
        if count := min(queue.demotable, queue.available_pooled):
            residency.make_residents_free(count)
        for _ in range(residency.demotions - before):
            self._out.append(queue._resident.popleft())
            assert self._out[-1].block_hash is None
        queue.frozen = True
        queue.refresh()

    def append_n(self, blocks: Any) -> None:
        self._append_n(blocks)
        self._back_for(blocks)

    def prepend_n(self, blocks: Any) -> None:
        self._prepend_n(blocks)
        self._back_for(blocks)

    def give_blank(self, blocks: Any) -> None:
        self._give_blank(blocks)
        self._back_for(blocks)

    def remove(self, block: Any) -> None:
        """A pooled block is in use again, so a page goes out."""
        self._remove(block)
        if block.block_id >= self._residency.boundary and self._queue.free_residents:
            page = self._queue._resident.popleft()
            if page.block_hash is not None:
                self._residency.entries.drop(page)
            self._out.append(page)
            self._queue.refresh()

    def _back_for(self, blocks: Any) -> None:
        for block in blocks:
            if block.block_id >= self._residency.boundary and self._out:
                self._queue._resident.append_n([self._out.pop()])
        self._queue.refresh()

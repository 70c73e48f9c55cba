"""New block ids for entries of block tables that the workers already hold."""

from __future__ import annotations

from collections.abc import Container

from pie_vllm.plan import Relabel


class RelabelLog:
    """Changes of block tables since the last ``drain``; the newest id counts.

    Attributes:
        ids: by request and index; read only.
    """

    def __init__(self) -> None:
        self.ids: dict[str, dict[int, int]] = {}

    def record(self, request_id: str, index: int, block_id: int) -> None:
        """Entry ``index`` of a request's table is ``block_id`` now."""
        self.ids.setdefault(request_id, {})[index] = block_id

    def drain(self, live: Container[str], fresh: Container[str]) -> tuple[Relabel, ...]:
        """Merged relabels of live requests that are not fresh; the rest is dropped."""
        relabels: list[Relabel] = []
        for request_id, ids in self.ids.items():
            if request_id in live and request_id not in fresh:
                relabels.extend(_runs(request_id, sorted(ids.items())))
        self.ids.clear()
        return tuple(relabels)


def _runs(request_id: str, entries: list[tuple[int, int]]) -> list[Relabel]:
    runs: list[Relabel] = []
    start, blocks = 0, []  # type: int, list[int]
    for index, block_id in entries:
        if blocks and index == start + len(blocks):
            blocks.append(block_id)
            continue
        if blocks:
            runs.append(Relabel(request_id, start, tuple(blocks)))
        start, blocks = index, [block_id]
    runs.append(Relabel(request_id, start, tuple(blocks)))
    return runs

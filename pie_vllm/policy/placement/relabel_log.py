"""New block ids for entries of block tables that the workers already hold."""

from __future__ import annotations

from collections.abc import Container, Sequence

from pie_vllm.plan import Relabel
from pie_vllm.policy.block import BlockId, RequestId


class RelabelLog:
    """Changes of block tables since the last ``drain``; the newest id counts.

    Attributes:
        ids: New block ids by request and index; read only.
    """

    def __init__(self) -> None:
        """Start without a change."""
        self.ids: dict[RequestId, dict[int, BlockId]] = {}

    def record(self, request_id: RequestId, first: int, block_ids: Sequence[BlockId]) -> None:
        """Entries of a request's table from ``first`` on are these now."""
        changed = self.ids.setdefault(request_id, {})
        changed.update(zip(range(first, first + len(block_ids)), block_ids, strict=True))

    def drain(self, live: Container[RequestId], fresh: Container[RequestId]) -> tuple[Relabel, ...]:
        """Merged relabels of live requests that are not fresh; the rest is dropped."""
        relabels: list[Relabel] = []
        for request_id, ids in self.ids.items():
            if request_id in live and request_id not in fresh:
                relabels.extend(_merged(request_id, sorted(ids.items())))
        self.ids.clear()
        return tuple(relabels)


def _merged(request_id: RequestId, entries: list[tuple[int, BlockId]]) -> list[Relabel]:
    """Fewest relabels for entries in order of their index."""
    relabels: list[Relabel] = []
    start, blocks = 0, []  # type: int, list[BlockId]
    for index, block_id in entries:
        if blocks and index == start + len(blocks):
            blocks.append(block_id)
            continue
        if blocks:
            relabels.append(Relabel(request_id, start, tuple(blocks)))
        start, blocks = index, [block_id]
    relabels.append(Relabel(request_id, start, tuple(blocks)))
    return relabels

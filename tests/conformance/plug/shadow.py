"""The block tables of a worker that follows scheduler outputs and plans."""

from __future__ import annotations

from typing import Any


class Shadow:
    """The block tables of a worker that follows vLLM's scheduler outputs and pie's plans."""

    def __init__(self, residency: Any, group: int) -> None:
        """Over a policy, and the KV cache group that it pools."""
        self.residency = residency
        self.group = group
        self.tables: dict[str, list[int]] = {}
        self.loads: list[list[int]] = []
        self.stored: set[int] = set()

    def check(self, out: Any, scheduler: Any) -> None:
        """Follow a step; its tables, writes and reads must be what the books say."""
        self._follow(out)
        self._check_copies(out.pie.plan, self._read(out, scheduler))

    def _follow(self, out: Any) -> None:
        for rid in out.finished_req_ids:
            self.tables.pop(rid, None)
        if out.pie.plan is not None:
            for rid, first, blocks in out.pie.plan.relabels:
                if rid in out.finished_req_ids:
                    continue
                table = self.tables[rid]
                assert first + len(blocks) <= len(table), f"relabel of {rid} beyond its table"
                table[first : first + len(blocks)] = blocks
        for new in out.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[self.group])
        cached = out.scheduled_cached_reqs
        for rid, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if rid in cached.resumed_req_ids:
                self.tables[rid] = list(ids[self.group])
            elif ids is not None:
                self.tables[rid].extend(ids[self.group])

    def _read(self, out: Any, scheduler: Any) -> set[int]:
        """Pooled blocks that a step reads."""
        boundary, read = self.residency.boundary, set()
        block_size = scheduler.kv_cache_manager.block_size
        for rid, count in out.num_scheduled_tokens.items():
            real = [b.block_id for b in self.residency.tables.get(rid, [])]
            held = self.tables[rid]
            assert held == real, f"worker's table of {rid} is {held}, scheduler's {real}"
            end = scheduler.requests[rid].num_computed_tokens
            for index in range((end - count) // block_size, (end - 1) // block_size + 1):
                assert real[index] < boundary, f"{rid} writes into pooled block {real[index]}"
            read |= {i for i in real if i >= boundary}
        return read

    def _check_copies(self, plan: Any, read: set[int]) -> None:
        if plan is None:
            assert not read, "pooled blocks are read without a plan"
            return
        if plan.loads is not None:
            self.loads = plan.loads.tolist()
        pairs = {b + i: r + i for b, r, n in self.loads for i in range(n)}
        assert set(pairs) == read, f"loads {sorted(pairs)}, reads {sorted(read)}"
        self.stored |= {r + i for b, r, n in plan.stores.tolist() for i in range(n)}
        assert set(pairs.values()) <= self.stored, "a row is loaded that was never stored to"

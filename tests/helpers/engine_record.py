"""What a scheduler decided in each step, and the bytes that its plans imply."""

from __future__ import annotations

from typing import Any

from pie_vllm.plan import NO_RUNS, num_copied


class Recorder:
    """Notes schedules, plans and preemptions of one scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._record: dict[str, Any] = {}
        self._scheduler = scheduler
        self._numbers: dict[str, int] = {}
        self._replayed: dict[int, list[int]] | None = None
        self._wrong: set[int] = set()
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._note(output)
            return output

        def preempted(request: Any, *args: Any, **kwargs: Any) -> Any:
            self._record["preempted"].append(request.priority)
            self._record["decoded"].append(request.num_output_tokens)
            self._record["computed"].append(request.num_computed_tokens)
            return preempt(request, *args, **kwargs)

        verified = scheduler.make_spec_decoding_stats

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._record["drafted"] += kwargs["num_draft_tokens"]
            self._record["accepted"] += kwargs["num_accepted_tokens"]
            return verified(*args, **kwargs)

        scheduler.schedule, scheduler._preempt_request = scheduled, preempted
        scheduler.make_spec_decoding_stats = counted
        drafted = scheduler.update_draft_token_ids

        def proposed(drafts: Any) -> None:
            self._note_drafts(drafts)
            if self._replayed is not None:
                self._replay(drafts)
            drafted(drafts)

        scheduler.update_draft_token_ids = proposed

    def start(self) -> dict[str, Any]:
        """Begin a record; it fills while steps run.

        Returns:
            ``schedule``: for each step that runs something, tokens by request, requests numbered by
            their first appearance; ``plans``; ``preempted``: priority of each request preempted;
            ``decoded`` and ``computed``: tokens that it had answered and computed by then;
            ``most_running``; ``blocks``: for each
            step, pooled blocks in use and all in use; ``group_blocks``: for each step, blocks of
            requests by KV cache group; ``drafts``: for each step that runs something, draft tokens
            by request; ``drafted`` and ``accepted``: numbers of draft tokens; ``proposed``: what a
            drafter proposed, each time with the request's number and its tokens so far.
        """
        self._numbers = {}
        self._record = {
            "schedule": [],
            "plans": [],
            "preempted": [],
            "decoded": [],
            "computed": [],
            "most_running": 0,
            "blocks": [],
            "group_blocks": [],
            "drafts": [],
            "drafted": 0,
            "accepted": 0,
            "proposed": [],
        }
        return self._record

    def replay(self, given: dict[str, Any] | None) -> None:
        """Put known tokens in place of what the drafter proposes, which runs all the same.

        Args:
            given: ``tokens``, all those of each request; ``wrong``, positions at which the draft is
                another token. None leaves drafts alone.
        """
        self._replayed = None if given is None else dict(enumerate(given["tokens"]))
        self._wrong = set() if given is None else set(given["wrong"])

    def _replay(self, drafts: Any) -> None:
        assert self._replayed is not None
        for name, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
            request = self._scheduler.requests.get(name)
            if request is None or request.is_prefill_chunk:
                continue
            first = request.num_tokens
            known = self._replayed[self._numbers[name]][first : first + len(tokens)]
            right = [
                token ^ 1 if first + place in self._wrong else token
                for place, token in enumerate(known)
            ]
            tokens[: len(right)] = right

    def groups(self) -> list[dict[str, Any]]:
        """KV cache groups: kind of spec, number of layers, tokens of a block, bytes of a page."""
        return [
            {
                "kind": type(group.kv_cache_spec).__name__,
                "layers": len(group.layer_names),
                "block_size": group.kv_cache_spec.block_size,
                "page_bytes": group.kv_cache_spec.page_size_bytes,
            }
            for group in self._scheduler.kv_cache_config.kv_cache_groups
        ]

    def _note_drafts(self, drafts: Any) -> None:
        """Those that the scheduler takes: not of requests that work on their prompt."""
        for name, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
            request = self._scheduler.requests.get(name)
            if request is not None and not request.is_prefill_chunk:
                number = self._numbers[name]
                self._record["proposed"].append([number, request.num_tokens, [*map(int, tokens)]])

    def _note(self, output: Any) -> None:
        tokens = output.num_scheduled_tokens
        for request_id in tokens:
            self._numbers.setdefault(request_id, len(self._numbers))
        record = self._record
        if tokens:  # Pie pauses for rows of its pool that are on their way.
            record["schedule"].append([[self._numbers[r], count] for r, count in tokens.items()])
            drafts = output.scheduled_spec_decode_tokens
            record["drafts"].append([[self._numbers[r], [*d]] for r, d in drafts.items()])
        orders = getattr(output, "pie", None)
        record["plans"].append(orders.plan if orders else None)
        record["most_running"] = max(record["most_running"], len(tokens))
        manager = self._scheduler.kv_cache_manager
        record["group_blocks"].append(
            [_num_blocks(group) for group in manager.coordinator.single_type_managers]
        )
        residency = getattr(manager, "residency", None)
        if residency is not None:
            residency.check_integrity()
            used = round(manager.block_pool.get_usage() * (manager.block_pool.num_gpu_blocks - 1))
            record["blocks"].append([residency.pooled_in_use, used])


def _num_blocks(group: Any) -> int:
    """Different blocks that requests have in one KV cache group."""
    tables = group.req_to_blocks.values()
    return len({block.block_id for table in tables for block in table if not block.is_null})


def copy_bytes(plans: list[Any], counters: dict[str, Any]) -> dict[str, Any]:
    """What the engine must have counted for these plans.

    Computed from the plans alone: a load list of None means the one before it,
    and a step that runs no model loads nothing into the ring.
    """
    block_bytes = counters.get("page_bytes", 0) * counters.get("num_layers", 0)
    loaded = stored = gates = steps = relabelled = 0
    loads = NO_RUNS
    for plan in plans:
        if plan is None:
            continue
        steps += 1
        if plan.loads is not None:
            loads = plan.loads
        stored += num_copied(plan.stores)
        loaded += num_copied(plan.promotions)
        relabelled += sum(len(relabel.blocks) for relabel in plan.relabels)
        if plan.forward:
            loaded += num_copied(loads)
            gates += counters["num_layers"]
    return {
        "implied": {
            "bytes_loaded": loaded * block_bytes,
            "bytes_stored": stored * block_bytes,
            "gates": gates,
            "steps": steps,
        },
        "relabelled": relabelled,
    }

"""Weights and adapters that change while requests run: a driver that notices stale KV."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.lora.request import LoRARequest

from tests.helpers.fuzz import BLOCK_SIZE
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import TagRunner, Work


class ChangingRunner(TagRunner):
    """Marks KV with the versions of model and adapter that computed it.

    Attributes:
        versions: of adapters by name.
        holders: requests that held blocks when their weights changed: they may read what they have.
        reloads: names of adapters by request that reloads them in its first step.
    """

    def __init__(self, runner: TagRunner) -> None:
        super().__init__(runner.memory, runner.block_size)
        self.versions: Counter[str] = Counter()
        self.holders: set[str] = set()
        self.reloads: dict[str, str] = {}
        self._adapters: dict[str, str] = {}

    def new_adapter(self, name: str) -> None:
        """The adapter's weights are others from now on."""
        self.versions[name] += 1
        self.holders |= {r for r in self.requests if self._adapters.get(r) == name}

    def execute(self, output: Any) -> Any:
        self.holders -= set(output.scheduled_cached_reqs.resumed_req_ids)
        for new in output.scheduled_new_reqs:
            if new.lora_request is not None:
                self._adapters[new.req_id] = new.lora_request.lora_name
                if new.req_id in self.reloads:
                    self.new_adapter(self.reloads.pop(new.req_id))
        return super().execute(output)

    def _add(self, work: Work, request_id: str, state: Any, start: int, end: int) -> None:
        adapter = self._adapters.get(request_id)
        salt, reads = state.salt, len(work.reads)
        if adapter is not None:
            state.salt = f"{salt} {self.versions[adapter]}"
        super()._add(work, request_id, state, start, end)
        state.salt = salt
        if request_id in self.holders:
            del work.reads[reads:]


class Changes:
    """A driver whose weights change between steps."""

    def __init__(self, made: Driver) -> None:
        self.made = made
        self.runner = made.runner = ChangingRunner(made.runner)
        self.stale = made.scheduler.pie_stale
        self._count = 0

    def ask(self, prompt: list[int], answer: int, lora: LoRARequest | None = None) -> str:
        """Add a request; returns its name."""
        self._count += 1
        name = f"ask{self._count}"
        self.made.add(make_request(name, prompt, answer, BLOCK_SIZE, lora_request=lora))
        return name

    def new_weights(self) -> None:
        """The model's weights are others, and pie knows."""
        self.runner.weights += 1
        self.runner.holders |= set(self.runner.requests)
        self.stale.new_weights()
        self.made._check()

    def reload(self, lora: LoRARequest) -> None:
        """An adapter is loaded in place, and pie knows."""
        self.runner.new_adapter(lora.lora_name)
        self.stale.adapter_added(lora)
        self.made._check()

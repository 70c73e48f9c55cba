"""A scheduler over a GPU that exists as a model only: its steps take as long as the model says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.real.bare_schedulers import geometry
from benchmarks.real.scheduler_side import BLOCK_SIZE, Side, flavour_of
from benchmarks.simulated.gpu_machines import LAYERS, MAX_NUM_SEQS, PAGE_BYTES, ROW_BYTES, Machine
from pie_vllm.geometry import Geometry
from pie_vllm.plan import PoolState, StepReport, Totals, num_copied

STEP_TOKENS = 8192
"""Maximum number of tokens in a step, as vLLM chooses on such a GPU."""


def sizes_of(machine: Machine, longest: int, *, pie: bool) -> Geometry:
    """The geometry that a server has on a machine.

    Args:
        machine: the machine.
        longest: number of blocks of the longest request.
        pie: whether it pools; if not, all of the device's KV bytes are resident blocks.
    """
    if pie:
        return machine.geometry(longest)
    # A pool of one block, which vLLM's scheduler knows nothing of.
    resident = machine.kv_bytes // ROW_BYTES
    return geometry(resident - 1, 1, 1, num_layers=LAYERS, page_bytes=PAGE_BYTES)


class ModelledSide(Side):
    """A scheduler with a modelled machine's sizes, and a clock that goes on by its steps.

    Attributes:
        clock: seconds since the start, by the model.
        step_seconds: seconds of the newest step, by the model; copies that its compute does not
            hide are in it.
    """

    def __init__(
        self, machine: Machine, longest: int, *, pie: bool, rows: int | None = None
    ) -> None:
        """Start at time zero without requests.

        Args:
            machine: the machine.
            longest: number of blocks of the longest request.
            pie: whether it is pie's scheduler.
            rows: number of rows of the pool; None for as many as a server plans.
        """
        sizes = sizes_of(machine, longest, pie=pie)
        if rows is not None:
            sizes = replace(sizes, rows=rows)
        profile = machine.profile()
        self._profile = profile
        self._link = machine.link
        self._totals = Totals()
        self.clock = self.step_seconds = 0.0
        super().__init__(
            flavour_of(pie=pie),
            sizes,
            requests_max=MAX_NUM_SEQS,
            tokens_max=STEP_TOKENS,
            length_max=longest * BLOCK_SIZE,
            prior=machine.prior()._replace(
                request_seconds=profile.per_request, prompt_seconds=profile.per_prompt_token
            ),
        )

    def report(self, output: Any) -> StepReport | None:
        """Let the model's time pass; returns the copies that pie's workers would report."""
        scheduled, requests = output.num_scheduled_tokens, self.scheduler.requests
        blocks = sum(-(-requests[name].num_computed_tokens // BLOCK_SIZE) for name in scheduled)
        tokens = output.total_num_scheduled_tokens - len(scheduled)
        seconds = self._profile.step_seconds(len(scheduled), tokens, blocks)
        orders = getattr(output, "pie", None)
        if orders is None:
            self.step_seconds = seconds
            self.clock += seconds
            return None
        plan, before = orders.plan, self._totals
        loaded = stored = 0
        if plan is not None:
            read_set = self.scheduler.kv_cache_manager.residency.read_set
            loaded = read_set.num_blocks + num_copied(plan.promotions)
            stored = num_copied(plan.stores)
        busy = loaded * ROW_BYTES / self._link
        stall = max(0.0, busy - seconds)
        self.step_seconds = seconds + stall
        self.clock += self.step_seconds
        self._totals = _with_copies(before, loaded, stored, busy)
        if plan is not None:
            self._totals = self._totals._replace(
                steps=before.steps + 1, stall_step=plan.step, step_stall=stall
            )
        pool = PoolState(orders.pool.chunks, number=orders.pool.number)
        return StepReport(self._totals, pool, seconds=self.step_seconds)


def _with_copies(before: Totals, loaded: int, stored: int, busy: float) -> Totals:
    """Sums after a step that copied so many blocks and kept the link busy for so many seconds."""
    return before._replace(
        bytes_loaded=before.bytes_loaded + loaded * ROW_BYTES,
        bytes_stored=before.bytes_stored + stored * ROW_BYTES,
        bytes_finished=before.bytes_finished + loaded * ROW_BYTES,
        load_seconds=before.load_seconds + busy,
    )


def smaller(machine: Machine, blocks: int) -> Machine:
    """The machine with less device memory for KV: so many blocks, ring included."""
    return replace(machine, kv_bytes=blocks * ROW_BYTES)


def prompt_of(number: int, tokens: int) -> list[int]:
    """A prompt that shares no block with those of other numbers."""
    prompt = [(number * 31 + token) % 997 for token in range(tokens)]
    prompt[:2] = [number % 991, 1000 + number // 991]
    return prompt

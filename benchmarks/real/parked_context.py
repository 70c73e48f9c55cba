"""A long context whose blocks are all parked comes back: what its admission and its end cost.

The context runs once, others take its pages, and it comes again beside requests that decode. Its
blocks are parked, found and copied back as on a server; steps take as long as a model of the
machine says, which decides how many blocks a step may bring back.
"""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple

from benchmarks.real.modelled_side import ModelledSide, prompt_of, smaller
from benchmarks.real.scheduler_side import BLOCK_SIZE, steady_heap
from benchmarks.simulated.gpu_machines import H200, Machine
from pie_vllm.policy.admission.transaction import LOOK_KEYS_MAX

BACKGROUND = 64
"""Requests that decode beside the context."""

BACKGROUND_BLOCKS = 16
ANSWER = 8
FILLER_BLOCKS = 96
"""Blocks of each prompt that takes others' pages: fewer than a step that decodes may park, because
a step's bound on parking does not count the prompts of newcomers."""

STEPS_MAX = 500
BASE_STEPS = 16


class ContextCost(NamedTuple):
    """What one context costs beyond the steps around it, milliseconds of CPU time.

    Attributes:
        blocks: number of its full blocks.
        steps: number of steps until it was admitted.
        admission: all steps until then together.
        admission_max: the dearest of them.
        finish: the step in which it ends.
        base: median of the whole steps before it came.
    """

    blocks: int
    steps: int
    admission: float
    admission_max: float
    finish: float
    base: float


class ParkedContext:
    """A side on which a context has run once; on pie's, all its blocks are parked by now."""

    def __init__(
        self, blocks: int, *, pie: bool = True, rows: int | None = None, machine: Machine = H200
    ) -> None:
        """Run the context, and other prompts until its pages are others'.

        Args:
            blocks: number of the context's full blocks.
            pie: whether it is pie's scheduler; on vLLM's, the pages stay the context's.
            rows: number of rows of the pool, all of which are taken; None for a pool of four times
                the device's blocks with room left.
            machine: the machine, of whose memory the device takes a part only.
        """
        resident = blocks + BACKGROUND * (BACKGROUND_BLOCKS + 4) + 4 * FILLER_BLOCKS
        self.blocks, self._tokens = blocks, blocks * BLOCK_SIZE + 1
        longest = max(blocks, FILLER_BLOCKS) + ANSWER
        self.side = ModelledSide(smaller(machine, resident), longest, pie=pie, rows=rows)
        if rows is not None:
            self._run_others("before", rows + resident)
        self._run("first", prompt_of(1, self._tokens), 1)
        if pie:
            self._run_others("after", resident)
        for number in range(BACKGROUND):
            length = BACKGROUND_BLOCKS * BLOCK_SIZE + 1 + number % BLOCK_SIZE
            self.side.add(f"beside{number}", prompt_of(800_000 + number, length), 2 * STEPS_MAX)
        self.side.settle()

    def _run_others(self, when: str, blocks: int) -> None:
        """Run other prompts of so many blocks together."""
        first = 10_000 if when == "before" else 400_000
        for number in range(-(-blocks // FILLER_BLOCKS)):
            self._run(f"{when}{number}", prompt_of(first + number, FILLER_BLOCKS * BLOCK_SIZE), 1)

    def _run(self, name: str, prompt: list[int], answer: int) -> None:
        """Run a request to its end."""
        self.side.add(name, prompt, answer)
        while name in self.side.scheduler.requests:
            self.side.step()

    @property
    def _running(self) -> Any:
        return self.side.scheduler.running

    def comes_back(self) -> ContextCost:
        """Admit it, let it decode and end.

        Raises:
            RuntimeError: it was not admitted, or not all its blocks were found.
        """
        side, manager = self.side, self.side.scheduler.kv_cache_manager
        found = _blocks_found(manager)
        with steady_heap():
            base = median(side.step().whole for _ in range(BASE_STEPS))
            side.add("again", prompt_of(1, self._tokens), ANSWER)
            extra = []
            while not any(r.request_id == "again" for r in self._running):
                extra.append(side.step().whole - base)
                if len(extra) > STEPS_MAX:
                    raise RuntimeError(f"a context of {self.blocks} blocks was not admitted")
            end = 0
            while "again" not in side.finished:
                end = side.step().whole
        again = _blocks_found(manager)
        if found is not None and again is not None and again - found < self.blocks:
            raise RuntimeError(f"not all of the context's {self.blocks} blocks were parked")
        return ContextCost(
            self.blocks,
            len(extra),
            sum(extra) / 1e6,
            max(extra) / 1e6,
            (end - base) / 1e6,
            base / 1e6,
        )

    def waits(self, steps: int) -> float:
        """Microseconds that pie's code takes longer in a step while the context cannot be admitted.

        It is the difference of two medians over the steps, of the time in pie's code and in the
        manager of blocks as far as it is about waiting requests; vLLM's own loop would drown it.
        All residents but a few are in use by others, who give as many back in each step as those
        that decode take: no step demotes. The steps in which it is looked up are part of its
        admission and not counted here.

        Raises:
            RuntimeError: it was admitted all the same.
        """
        side, manager = self.side, self.side.scheduler.kv_cache_manager
        free = manager.residency.queue.free_residents
        held = manager.block_pool.get_new_blocks(free - 2 * BACKGROUND)

        def step() -> int:
            given, held[:] = held[: BACKGROUND // BLOCK_SIZE], held[BACKGROUND // BLOCK_SIZE :]
            manager.block_pool.free_blocks(given)
            own = side.own(side.step())
            return own + int(side.scheduler.admitting)

        side.scheduler.watch_admissions()
        with steady_heap():
            base = [step() for _ in range(steps)]
            side.add("again", prompt_of(1, self._tokens), ANSWER)
            for _ in range(self.blocks // LOOK_KEYS_MAX + BASE_STEPS):
                step()
            demotions = manager.residency.demotions
            waiting = [step() for _ in range(steps)]
        if manager.residency.demotions > demotions:
            raise RuntimeError("steps in which the context waited demoted blocks")
        waits = "again" in side.scheduler.requests  # Else it has come to its end.
        if not waits or any(r.request_id == "again" for r in self._running):
            raise RuntimeError(f"a context of {self.blocks} blocks did not have to wait")
        manager.block_pool.free_blocks(held)
        return (median(waiting) - median(base)) / 1e3


def _blocks_found(manager: Any) -> int | None:
    """Number of parked blocks found so far; None for vLLM's manager."""
    counts = getattr(manager, "hit_counts", None)
    return None if counts is None else int(counts.hits.parked)

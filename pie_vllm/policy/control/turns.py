"""Which requests with pooled blocks run in a step, when not all their blocks can be loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from pie_vllm.geometry import cdiv
from pie_vllm.policy.control.decider import Decision
from pie_vllm.policy.placement.residency import Residency

LONGEST_WAIT = 100
"""Maximum number of steps in a row that a running request is left out, per load budget that its
blocks take, whatever the priority of others and however little is saved up. A request that alone
exceeds the budget therefore slows the others by at most 1 %."""


class Turns:
    """Requests with pooled blocks take turns, least recently run first.

    Those whose blocks fit the budget run in strict order, so each of ``n`` of them runs at least
    once in ``n`` steps; a newcomer queues behind all others. A request whose blocks alone exceed
    the budget is passed over until the ``spare`` blocks saved up cover it, or nobody else runs.
    Who was left out for ``LONGEST_WAIT`` steps, for each budget that its blocks take, comes first.

    Attributes:
        left_out: Number of times so far that a running request was left out of a step.
        taken: Whether requests take turns in this step, because the link cannot feed all of them.
        exceeds: Whether a request of this step alone exceeds the load budget, or all of them
            together where nobody may be left out.
        allowed: Whether requests may be left out. If not, nothing is demoted beyond what is
            loaded in each step, and vLLM preempts instead.
    """

    def __init__(self, *, allowed: bool = True) -> None:
        """Nobody has run; ``allowed`` as the class says."""
        self.allowed = allowed
        self._clock = 0
        self._last: dict[str, int] = {}
        self.taken = False
        self.left_out = 0
        self.exceeds = False

    def begin_step(
        self,
        running: Sequence[Any],
        residency: Residency,
        decision: Decision,
        priority: Callable[[str], int] | None = None,
    ) -> list[str]:
        """Begin the residency's step; returns whom to leave out of it.

        Args:
            running: requests, by their ``request_id``.
            residency: what they hold.
            decision: for the step.
            priority: as ``choose``.
        """
        self.exceeds = False
        budget = decision.load_blocks_max
        short = budget < residency.window and residency.pooled_in_use > budget
        if not self.allowed:
            return self._all_run(short, running, residency, decision)
        self.taken = short
        if not self.taken and not residency.queue.frozen:
            return []
        out: list[str] = []
        if self.taken:
            of = residency.read_set.pooled
            pooled = {r.request_id: blocks for r in running if (blocks := of(r.request_id))}
            others = len(running) > len(pooled)
            out, self.exceeds = self.choose(
                pooled, budget, decision.spare_load_blocks_max, others, priority
            )
            self.left_out += len(out)
        residency.begin_step(out, decision.pooled_demotion_max if len(running) > 1 else None)
        return out

    def _all_run(
        self, short: bool, running: Sequence[Any], residency: Residency, decision: Decision
    ) -> list[str]:
        """``begin_step`` where nobody may be left out; ``short`` is whether the link is."""
        self.exceeds = short
        bound = decision.pooled_admission_max
        if short or residency.queue.frozen or residency.pooled_in_use >= bound:
            residency.begin_step((), bound if len(running) > 1 else None)
        return []

    def end_step(self, scheduled: Iterable[str], residency: Residency) -> None:
        """These requests run in the step."""
        if self.taken:
            self.ran(r for r in scheduled if residency.read_set.is_running(r))

    def choose(
        self,
        pooled: Mapping[str, Collection[int]],
        budget: int,
        spare: int,
        others: bool,
        priority: Callable[[str], int] | None = None,
    ) -> tuple[list[str], bool]:
        """The requests to leave out of this step, and whether one exceeds the budget.

        Args:
            pooled: the pooled blocks of each running request that has any.
            budget: blocks that the step may load; a shared block counts once.
            spare: blocks beyond it that one request may load.
            others: whether requests without pooled blocks run.
            priority: of a request; lower ones go first. Equal for all if None.
        """
        self._clock += 2
        self._last = {r: self._last.get(r, self._clock) for r in pooled}
        order = sorted(pooled, key=self._last.__getitem__)
        if priority is not None:
            order.sort(key=priority)
        overdue = {r for r in order if budget and self._overdue(r, cdiv(len(pooled[r]), budget))}
        if overdue:
            order.sort(key=lambda r: (r not in overdue, self._last[r] if r in overdue else 0))
        loaded: set[int] = set()
        out: list[str] = []
        exceeds = full = False
        large: str | None = None
        for request_id in order:
            blocks = pooled[request_id]
            if len(blocks) > budget:
                may = request_id in overdue or len(blocks) <= budget + spare
                if may and not loaded and not exceeds:
                    exceeds = True
                    loaded.update(blocks)
                else:
                    out.append(request_id)
                    large = large or request_id
            elif exceeds or full or not _fits(loaded, blocks, budget):
                out.append(request_id)
                full = True
            else:
                loaded.update(blocks)
        if not loaded and not others and large is not None:
            out.remove(large)
            exceeds = True
        return out, exceeds

    def _overdue(self, request_id: str, budgets: int) -> bool:
        # The clock goes on by two in each step.
        return self._clock - self._last[request_id] > 2 * LONGEST_WAIT * budgets

    def ran(self, requests: Iterable[str]) -> None:
        """These requests with pooled blocks were scheduled."""
        for request_id in requests:
            self._last[request_id] = self._clock + 1  # Behind who came in the same step.


def _fits(loaded: set[int], blocks: Collection[int], budget: int) -> bool:
    """Whether these blocks and those loaded are no more than the budget; most are not shared."""
    over = len(loaded) + len(blocks) - budget
    return over <= 0 or sum(block in loaded for block in blocks) >= over

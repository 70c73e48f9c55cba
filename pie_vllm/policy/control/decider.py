"""How much a step may load, and how much may be pooled, so that pooling does not slow it."""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple, Protocol

from pie_vllm.config import TARGET_SLOWDOWN_DEFAULT
from pie_vllm.plan import Prior
from pie_vllm.policy.control.detector import NOTHING, Detector, Observation

MARGIN = 0.9
"""Fraction of a step's predicted time that its loads may take; predictions err by some percent."""

LEAST_GAIN = 0.05
AIM = 0.8
"""Fraction of the target slowdown at which the load budget is cut. The stall average restarts at
zero after a cut and lags, so actual stall can exceed it by up to 25 %."""

CONTENTION_SHARE = 0.5
"""Fraction of the target slowdown granted to interference, by which loads slow the compute beside
them; the rest is granted to stall."""

LEAST_AIM = 0.2
"""Fraction of the target slowdown up to which stall never cuts the load budget, whatever the
interference."""

BACK_OFF = 0.8
RECOVER = 0.02
COOL_DOWN = 10
"""Number of steps after a cut before the next change; the stall is averaged over about as many."""

AHEAD_SHARE = 0.1
"""Fraction of what the link copies during a step that may be stored ahead of eviction. The first
layer's KV write waits for its part, so a step of L layers takes 1/L of this fraction longer."""

LONGEST_TURN = 10
"""Maximum number of steps in which all pooled blocks in use are loaded once. Requests that wait
longer for their turn are better preempted."""

HANDLED_SECONDS = 1e-3
HANDLED_SHARE = 0.05
HANDLED_SECONDS_MAX = 2e-3
HANDLED_BLOCK_SECONDS = 5e-6
"""Bound on what parking and restoring may take of the scheduler in a step: ``HANDLED_SECONDS``, or
``HANDLED_SHARE`` of the step's predicted time if that is more, but no more than
``HANDLED_SECONDS_MAX``. A block that is looked up, restored
and whose page evicts another takes it up to ``HANDLED_BLOCK_SECONDS``, measured with blocks of 16
tokens, 8,192 of them parked among 200,000 rows, at 60 M turns of an empty Python loop a second."""


def handled_blocks(step_seconds: float) -> int:
    """Maximum number of blocks that the scheduler handles in a step of a predicted time."""
    seconds = max(HANDLED_SECONDS, HANDLED_SHARE * step_seconds)
    return int(min(seconds, HANDLED_SECONDS_MAX) / HANDLED_BLOCK_SECONDS)


FIRST_BLOCKS = 4
"""Load budget and admission limit, in blocks, while link bandwidth or step time is unknown."""


class Decision(NamedTuple):
    """Bounds of one step.

    Attributes:
        load_blocks_max: Maximum number of pooled blocks that the step loads behind its compute.
        pooled_admission_max: Maximum number of pooled blocks in use at which a waiting request is
            still admitted.
        spare_load_blocks_max: Maximum number of blocks that one request alone may load beyond
            ``load_blocks_max``, out of the stall that the target allows over time.
        pooled_demotion_max: Number of pooled blocks in use from which on nothing is demoted while
            several requests run; None for no bound.
        park_blocks_max: Maximum number of blocks that the step stores for parking; None for no
            bound.
        restore_enabled: Whether parked KV is copied back, which is faster than computing it again.
        store_ahead_max: Maximum number of blocks, within ``park_blocks_max``, that the step stores
            ahead of their eviction.
        restore_blocks_max: Maximum number of blocks that the link copies back behind the step's
            compute; None for no bound.
        prompt_demotion_max: Maximum number of blocks demoted for prompts in the step, so that the
            link stores them behind its compute; None for no bound.
        handled_blocks_max: Maximum number of blocks that the step stores for parking, and of those
            that it restores while others run, for the scheduler's own time; None for no bound.
    """

    load_blocks_max: int
    pooled_admission_max: int
    spare_load_blocks_max: int
    pooled_demotion_max: int | None = None
    park_blocks_max: int | None = None
    restore_enabled: bool = True
    store_ahead_max: int = 0
    restore_blocks_max: int | None = None
    prompt_demotion_max: int | None = None
    handled_blocks_max: int | None = None

    @property
    def parked_at_once(self) -> int | None:
        """Maximum number of blocks that the step stores for parking, for link and scheduler."""
        parks, handled = self.park_blocks_max, self.handled_blocks_max
        if parks is None or handled is None:
            return handled if parks is None else parks
        return parks if parks < handled else handled


class Decides(Protocol):
    """A Decider, or something in its place.

    Attributes:
        detector: What the steps said.
    """

    detector: Detector

    def decide(self, prompt_tokens: int = 0) -> Decision:
        """For the step that is about to be scheduled."""

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn from a step."""


class Decider:
    """Link budget by a model, corrected by the stall that steps show.

    Model: ``budget = gain * bandwidth * step_seconds / row_bytes``. Feedback: while loads within
    the budget stall more than the target, ``gain`` is cut by a fifth; otherwise it comes back
    slowly. What the target leaves of the time is saved up, up to one load of the whole window,
    for a request whose blocks alone exceed the budget.

    What a load takes from the compute beside it, by memory bandwidth that they share, takes its
    part of the target too: no more blocks are loaded than that allows. Where it is too much for any
    block, because a step that streams costs something at all, steps stream in bursts, one of so
    many. Where a turn of all pooled blocks takes more than ``LONGEST_TURN`` steps, nothing more is
    pooled.

    A prompt may have so many blocks demoted in a step as the link stores while it computes them.
    For parking a step may store as many blocks as the link takes while it computes; the other
    direction is not counted against it. A tenth of them may be stored ahead of eviction, but none
    while the budget was just cut. A parked block is restored if that takes the link less time than
    its tokens take to compute; if not, nothing is stored for parking either.

    Attributes:
        detector: what the steps said.
    """

    def __init__(
        self,
        row_bytes: int,
        window: int,
        target: float | None = TARGET_SLOWDOWN_DEFAULT,
        prior: Prior = NOTHING,
        block_tokens: int = 1,
    ) -> None:
        """Until bandwidth and step time are known, a few blocks may be pooled.

        Args:
            row_bytes: of one block in all layers.
            window: pooled ids.
            target: slowdown allowed as a share of the time without; None limits nothing.
            prior: what is known of the link and of steps.
            block_tokens: tokens of a block.
        """
        self._block_tokens = block_tokens
        self._contention = prior.limits_contention
        self.detector = Detector(prior)
        self._row_bytes = row_bytes
        self._window = window
        self._target = target
        self._gain = MARGIN
        self._cool = 0
        self._saved = 0.0
        self._carried = 0.0
        self._known: tuple[float | None, float | None, float] | None = None
        self._rate: float | None = None  # Blocks a second, once known.
        self._hidden: float | None = None  # Blocks that a step which only decodes can load.
        self._more = 0.0  # Blocks for each second that a step takes longer.
        self._burst = 0  # Blocks of a step that streams, where not every one does.
        self._share = 0.0  # Of the time, that loads in every step take from the compute.
        first = min(FIRST_BLOCKS, window)
        everything = Decision(
            load_blocks_max=window, pooled_admission_max=window, spare_load_blocks_max=0
        )
        self._all_pooled = self._everything = everything
        self._first = Decision(
            load_blocks_max=first,
            pooled_admission_max=first,
            spare_load_blocks_max=0,
            park_blocks_max=FIRST_BLOCKS,
            restore_blocks_max=first,
        )
        if target is None:
            self._first = everything._replace(store_ahead_max=window)
        if target is not None:
            self._predict(target)

    def observe(self, seen: Observation, *, within_budget: bool = True) -> None:
        """Learn from a step; ``within_budget`` as ``Detector.observe``."""
        detector, target = self.detector, self._target
        within_budget &= self._hidden is not None and not seen.restored
        detector.observe(seen, within_budget=within_budget)
        bandwidth = detector.bandwidth
        if target is None or bandwidth is None:
            return
        # What is restored need not be computed: that is not pooling's cost.
        stall = 0.0 if seen.restored else seen.stall_seconds
        most = self._window * self._row_bytes / bandwidth
        lost = stall
        if self._contention and seen.bytes_loaded:
            lost += detector.cost.seconds(seen.bytes_loaded)
            most += detector.cost.seconds(self._window * self._row_bytes)
        saved = self._saved + target * (seen.seconds - lost) - lost
        self._saved = most if saved > most else -most if saved < -most else saved
        if self._cool:
            self._cool -= 1
        elif seen.bytes_loaded and within_budget:
            self._correct(target)
        known = detector.step_seconds, detector.bandwidth, self._gain
        if known != self._known:
            self._known = known
            self._predict(target)

    def _predict(self, target: float) -> None:
        bandwidth, step = self.detector.bandwidth, self.detector.step_seconds
        if bandwidth is None:
            return
        self._rate = bandwidth / self._row_bytes
        if step is None:
            return
        self._more = self._gain * self._rate
        self._hidden = hidden = self._more * step
        self._everything = self._with_parking(self._all_pooled, 0)
        if self._contention:
            self._spread(target, hidden, step)

    def _spread(self, target: float, hidden: float, step: float) -> None:
        """Within what loads may take from the compute: fewer blocks, or fewer steps that load."""
        cost, most = self.detector.cost, CONTENTION_SHARE * target * step
        blocks = min(max(int(hidden), 1), self._window)
        seconds = cost.seconds(blocks * self._row_bytes)
        self._burst = 0
        if seconds > most and cost.fixed < most:
            block = cost.per_byte * self._row_bytes
            self._hidden = (most - cost.fixed) / block
            self._more = CONTENTION_SHARE * target / block
        elif seconds > most:
            self._burst, self._hidden = blocks, blocks * most / seconds
        self._share = min(seconds, most) / step

    def _correct(self, target: float) -> None:
        """Feedback on a step whose loads were to hide behind its compute."""
        detector = self.detector
        aim = max(AIM * target - self._share, LEAST_AIM * target)
        if detector.stall_share > aim:
            self._gain = max(self._gain * BACK_OFF, LEAST_GAIN)
            self._cool = COOL_DOWN
            detector.forget_stall()  # What comes now is of another budget.
        else:
            self._gain = min(self._gain + RECOVER, MARGIN)

    def decide(self, prompt_tokens: int = 0) -> Decision:
        """For the step that is about to be scheduled.

        Args:
            prompt_tokens: tokens that it will compute beyond one for each request.
        """
        window, rate, hidden = self._window, self._rate, self._hidden
        if rate is None or hidden is None:
            return self._first
        spare = self._saved * rate if self._saved > 0 else 0
        if self._burst:
            return self._in_bursts(hidden, spare, prompt_tokens)
        if hidden >= window:
            if not prompt_tokens:
                return self._everything
            return self._with_parking(self._all_pooled, prompt_tokens)
        exact = hidden + self._carried
        if prompt_tokens:
            exact += self._more * self.detector.slope * prompt_tokens
        # Less than a block a step is a block every few steps.
        self._carried = exact % 1.0
        bounds = Decision(
            load_blocks_max=window if exact > window else int(exact),
            pooled_admission_max=int(hidden),
            spare_load_blocks_max=window if spare > window else int(spare),
            pooled_demotion_max=int(hidden * LONGEST_TURN),
        )
        return self._with_parking(bounds, prompt_tokens)

    def _with_parking(self, bounds: Decision, prompt_tokens: int) -> Decision:
        """A decision completed by the bounds on parking and on what prompts may have demoted."""
        rate, slope = self._rate or 0.0, self.detector.slope
        step = self.detector.step_seconds or 0.0
        seconds = step + slope * prompt_tokens
        taken = rate * seconds
        handled = handled_blocks(seconds)
        # Of a block, the part whose copy the compute of its own tokens hides.
        hidden = rate * slope * self._block_tokens
        restores = not slope or hidden >= 1.0
        if not isfinite(taken):
            return bounds._replace(
                restore_enabled=restores, store_ahead_max=self._window, handled_blocks_max=handled
            )
        stores = None
        if self._target is not None and hidden < 1.0:
            stores = max(1, int(MARGIN * rate * step / (1.0 - hidden)))
        if not restores:
            return bounds._replace(
                park_blocks_max=0,
                restore_enabled=False,
                restore_blocks_max=0,
                prompt_demotion_max=stores,
                handled_blocks_max=handled,
            )
        ahead = 0 if self._cool else int(AHEAD_SHARE * taken)
        at_once = None if self._target is None else max(1, int(self._gain * taken))
        return bounds._replace(
            park_blocks_max=max(1, int(MARGIN * taken)),
            store_ahead_max=ahead,
            restore_blocks_max=at_once,
            prompt_demotion_max=stores,
            handled_blocks_max=handled,
        )

    def _in_bursts(self, hidden: float, spare: float, prompt_tokens: int) -> Decision:
        self._carried += hidden
        streams = self._carried >= self._burst
        if streams:
            self._carried = min(self._carried - self._burst, self._burst)
        # One that streams in so many steps brings ``hidden`` blocks a step.
        most = int(hidden * LONGEST_TURN) if self._burst <= hidden * LONGEST_TURN else 0
        bounds = Decision(
            load_blocks_max=self._burst if streams else 0,
            pooled_admission_max=min(int(hidden), most),
            spare_load_blocks_max=min(int(spare), self._window),
            pooled_demotion_max=most,
        )
        return self._with_parking(bounds, prompt_tokens)

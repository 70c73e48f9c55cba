"""What does pie add to a scheduler step, compared with stock vLLM's scheduler?

Real schedulers, block size 16, no model: CPU time of the scheduler's thread, so that other work on
the machine disturbs little. A whole step is `schedule`, the pickling of the step's orders for the
workers and back, and `update_from_output` with its statistics. Sizes and chunks of the pool are
those that a server plans on an H200 with an 8B model. One row answers one question:

    admission    a context of so many blocks comes back that is parked whole: all steps until it is
                 admitted, together and the dearest, beyond the steps around them
    finish       the step in which that context ends
    head         pie's code in a step while that context waits at the head of the queue and cannot
                 enter, beyond a step without it
    chats        250 chats of 8k tokens that come back to an H200, whose clock is a model:
                 percentiles of `schedule`, steps in which the scheduler takes longer than the GPU
    steps        256 requests that decode, both schedulers step by step in turns: nothing pooled;
                 2,048 blocks pooled; 16 demotions a step; pooled requests left out in turns
    start        the plugin is installed, and vLLM starts with `--block-manager default`
    row          memory of the books for each parked row, without its key

Sides take turns, and figures are medians of `--rounds`. "own" is the time in pie's code of a step,
"difference" what the whole step takes longer: the latter holds also what pie makes vLLM's code do.
`--short` is small enough for a test, and says nothing about a server.

    python -m benchmarks.scheduler_cost [--only admission,steps] [--short] [--sync]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.harness.display import table, working
from benchmarks.harness.machine import facts, loop_rate
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result
from benchmarks.real.parked_context import ContextCost, ParkedContext
from benchmarks.real.returning_chats import ChatsCost, chats_cost
from benchmarks.real.row_bookkeeping import bookkeeping_bytes
from benchmarks.real.scheduler_phases import phase_costs
from benchmarks.real.start_up import start_up
from benchmarks.simulated.gpu_machines import ROW_BYTES


class Scale(NamedTuple):
    """How large the rows are.

    Attributes:
        contexts: numbers of blocks of the contexts that come back.
        waiting: numbers of blocks of the contexts that wait.
        waiting_steps: number of steps for which they do.
        blocks: number of blocks under the 256 requests.
        steps: number of steps of each of their phases.
        chats: number of chats.
        chat_tokens: mean number of tokens of a chat.
        chat_steps: number of steps in which they are watched.
        chat_kv_bytes: device memory for their KV, in bytes.
        chat_haste: factor by which their answers and pauses are shorter.
        rows: number of parked rows whose books are weighed.
    """

    contexts: tuple[int, ...] = (512, 2048, 8192)
    waiting: tuple[int, ...] = (2048, 8192)
    waiting_steps: int = 64
    blocks: int = 100_000
    steps: int = 128
    chats: int = 250
    chat_tokens: int = 8192
    chat_steps: int = 1300
    chat_kv_bytes: int = 110 * 10**9
    chat_haste: float = 1.0
    rows: int = 30_000


SHORT = Scale(
    contexts=(64,),
    waiting=(2048,),
    waiting_steps=4,
    blocks=10_000,
    steps=8,
    chats=12,
    chat_tokens=512,
    chat_steps=40,
    chat_kv_bytes=250 * ROW_BYTES,
    chat_haste=20.0,
    rows=2_000,
)

Line = tuple[str, float, str]
"""What was measured, the figure, and what it is held against."""


def medians(costs: Sequence[Sequence[Any]]) -> list[Any]:
    """The median of each figure over several measurements."""
    return [*map(median, zip(*costs, strict=True))]


class Run:
    """One run of the command: measures each row in ``rounds``, however many print from it."""

    def __init__(self, scale: Scale, rounds: int, asynchronous: bool) -> None:
        """Nothing is measured yet."""
        self._scale, self._rounds, self._asynchronous = scale, rounds, asynchronous
        self._contexts = cache(self._measure_contexts)

    def _measure_contexts(self, blocks: int) -> tuple[ContextCost, ContextCost]:
        """Pie's and stock's, in turns."""
        with working(f"{blocks:,} blocks come back"):
            found = [
                [ParkedContext(blocks, pie=pie).comes_back() for pie in (True, False)]
                for _ in range(self._rounds)
            ]
        pie, stock = zip(*found, strict=True)
        return ContextCost(*medians(pie)), ContextCost(*medians(stock))

    def admission(self) -> list[Line]:
        """A parked context comes back."""
        lines: list[Line] = []
        for blocks in self._scale.contexts:
            pie, stock = self._contexts(blocks)
            asked = {512: "3 ms", 8192: "40 ms"}.get(blocks, "")
            against = f"stock, cached: {stock.admission:.1f} ms"
            lines += [
                (f"{blocks:,} blocks: all {pie.steps} steps, ms", pie.admission, asked or against),
                (f"{blocks:,} blocks: dearest step, ms", pie.admission_max, "2 ms"),
            ]
        return lines

    def finish(self) -> list[Line]:
        """A context ends."""
        lines: list[Line] = []
        for blocks in self._scale.contexts:
            pie, stock = self._contexts(blocks)
            asked = "1.5 ms; " if blocks == 8192 else ""
            lines.append(
                (f"{blocks:,} blocks, ms", pie.finish, f"{asked}stock: {stock.finish:.2f}")
            )
        return lines

    def head(self) -> list[Line]:
        """A context waits at the head of the queue."""
        lines: list[Line] = []
        for blocks in self._scale.waiting:
            with working(f"{blocks:,} blocks wait"):
                steps = self._scale.waiting_steps
                waits = median(ParkedContext(blocks).waits(steps) for _ in range(self._rounds))
            lines.append((f"{blocks:,} blocks, us a step", waits, "20 us"))
        return lines

    def chats(self) -> list[Line]:
        """Chats come back to an H200."""
        found: dict[bool, list[ChatsCost]] = {False: [], True: []}
        for pie in (False, True) * self._rounds:
            with working(f"chats, {'pie' if pie else 'stock'}"):
                found[pie].append(self._chats_of(pie))
        stock, pie_cost = (ChatsCost(*medians(found[pie])) for pie in (False, True))
        return [
            ("schedule p50, us", pie_cost.p50, f"stock: {stock.p50:,.0f}"),
            ("schedule p99, us", pie_cost.p99, f"2 x stock: {2 * stock.p99:,.0f}"),
            ("schedule at most, us", pie_cost.max, f"stock: {stock.max:,.0f}"),
            ("whole step p99, us", pie_cost.whole_p99, f"stock: {stock.whole_p99:,.0f}"),
            (
                f"of {pie_cost.steps:,} steps, above the GPU's",
                pie_cost.over_gpu,
                f"0; stock: {stock.over_gpu}",
            ),
            ("running requests, mean", pie_cost.running, f"stock: {stock.running:.0f}"),
            ("blocks found parked", pie_cost.restored, ""),
        ]

    def _chats_of(self, pie: bool) -> ChatsCost:
        return chats_cost(
            pie=pie,
            chats=self._scale.chats,
            steps=self._scale.chat_steps,
            tokens=self._scale.chat_tokens,
            kv_bytes=self._scale.chat_kv_bytes,
            haste=self._scale.chat_haste,
        )

    def steps(self) -> list[Line]:
        """256 requests decode."""
        scale = self._scale
        with working("256 requests"):
            costs = phase_costs(
                scale.blocks, scale.steps, self._rounds, asynchronous=self._asynchronous
            )
        asked = {"idle": "40 us", "steady": "80 us", "demoting": "300 us"}
        lines: list[Line] = []
        for phase, cost in costs.items():
            error = f"± {cost.difference_error:.0f}; stock: {cost.stock:,.0f}"
            lines += [
                (f"{phase}: difference, us", cost.difference, asked.get(phase, "")),
                (f"{phase}: the same, p99", cost.difference_p99, error),
                (f"{phase}: the same, at most", cost.difference_max, ""),
                (f"{phase}: own, us", cost.own, f"{cost.demotions:.1f} demotions"),
                (f"{phase}: shipped in, us", cost.ship, f"{cost.pooled:,.0f} blocks pooled"),
            ]
        return lines

    def start(self) -> list[Line]:
        """VLLM starts without pie."""
        with working("a start with --block-manager default"):
            found = start_up()
        return [
            ("seconds of CPU time more", found.seconds, "0.1 s"),
            ("modules imported for it", len(found.modules), ""),
        ]

    def row(self) -> list[Line]:
        """The books of a parked row."""
        with working(f"{self._scale.rows:,} parked rows"):
            return [("bytes a parked row", bookkeeping_bytes(self._scale.rows), "200 bytes")]


ROWS: dict[str, Callable[[Run], list[Line]]] = {
    "admission": Run.admission,
    "finish": Run.finish,
    "head": Run.head,
    "chats": Run.chats,
    "steps": Run.steps,
    "start": Run.start,
    "row": Run.row,
}
"""Each row's measurement, by the name that ``--only`` takes."""


def main() -> None:
    """The command line."""
    parser = plain_parser("scheduler_cost", __doc__)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between them")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="whose medians are given")
    parser.add_argument("--sync", action="store_true", help="the plain schedulers in 'steps'")
    parser.add_argument("--output", type=Path, default=RESULTS / "scheduler_cost")
    args = parser.parse_args()
    names = args.only.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; rows are {', '.join(ROWS)}")
    run = Run(SHORT if args.short else Scale(), args.rounds, not args.sync)
    speed = [loop_rate() / 1e6]
    data = {}
    for name in names:
        lines = ROWS[name](run)
        table(
            name,
            ["", "measured", "asked, or beside it"],
            [[what, f"{figure:,.2f}", against] for what, figure, against in lines],
        )
        data[name] = {what: [figure, against] for what, figure, against in lines}
        speed.append(loop_rate() / 1e6)
    write_result(args.output, {"machine": facts(), "million_loops_per_second": speed, **data})


if __name__ == "__main__":
    main()

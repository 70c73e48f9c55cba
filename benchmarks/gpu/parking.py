"""Chats that come back, and chats that are preempted: parked KV against vLLM's own offloading.

The loads `returning` (4 times the device's KV together) and `preempted` of `benchmarks.parking`, at
equal device bytes, ring included, and equal CPU bytes. Dummy weights of Llama-3-8B's shape; all
sides in one process each, where what is computed can be counted; answers are not compared. Rounds
bring new chats, so that each begins with caches full of what nobody asks for again.

    stock       the device's KV bytes, vLLM's prefix cache
    pie         the same bytes and a CPU pool, in which what leaves the device is parked
    connector   as stock, with --kv-offloading-size of the pool's bytes: vLLM's own offloading
    pie_off     as pie, with --pie-parking off: running chats alone use the pool
    stock_all   KV bytes for every chat
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from benchmarks.gpu.harness.chatting import MOVED, TIERS
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.engines import EngineError, EngineProcess
from benchmarks.gpu.harness.models import EIGHT_B, TINY, write_config
from benchmarks.gpu.harness.sides import Side, common, in_one_process, run_in_groups
from benchmarks.gpu.serving import GIB, missing_arguments
from benchmarks.harness.rounds import Figures, Question
from benchmarks.harness.stats import Spread, paired_ratio, spread
from benchmarks.real.arrivals import LAST_TOKEN, RATE_SHARE, SingleChats, TurnChats

LOADS = ("returning", "preempted")
SIDES = ("stock", "pie", "connector", "pie_off", "stock_all")
PAIRS = (
    ("pie", "stock"),
    ("connector", "stock"),
    ("pie", "connector"),
    ("pie_off", "stock"),
    ("pie", "pie_off"),
    ("stock_all", "stock"),
)
COMPARED = ("tok_s", "ttft_p50_ms", "ttft_p99_ms", "latency_p99_s")
COUNTED = ("prefill_tokens", "recomputed_tokens", "preemptions")

AIMS = (
    Question("pie", "connector", 1.0),
    Question("pie", "connector", 1.0, "ttft_p50_ms", less=True),
)
"""What is aimed at in both loads; to miss it fails nothing."""

MUST = (Question("pie", "stock", 0.3, "prefill_tokens", less=True),)
"""Share of stock's prompt tokens that chats which come back may compute: a count, which no
machine's speed changes much."""

SPARE_BLOCKS = 64
"""Blocks that stock_all and the pool have beside those of every chat."""


class Size(NamedTuple):
    """Sizes of the loads and of the device.

    Attributes:
        device: tokens of KV that it holds, for all sides but stock_all.
        turns: chats of `returning`; the size of their first prompts follows from `device`.
        single: chats of `preempted`.
        repeats: number of runs of each load.
    """

    device: int
    turns: TurnChats
    single: SingleChats
    repeats: int


FULL = Size(
    16384, TurnChats(32, 3, 0, 64, 32, at_once=4), SingleChats(64, (400, 800), (256, 384)), 3
)
QUICK = Size(
    16384, TurnChats(32, 2, 0, 64, 32, at_once=4), SingleChats(40, (400, 800), (256, 384)), 2
)
DRY = Size(1024, TurnChats(12, 2, 0, 32, 16, at_once=2), SingleChats(24, (48, 80), (64, 96)), 2)


def run(context: Context) -> None:
    """All sides, as many at once as fit the device."""
    size = DRY if context.dry else QUICK if context.quick else FULL
    size = size._replace(turns=size.turns.outgrowing(size.device))
    sides = choose(context, size)
    context.report.fact("KV of the device, tokens", size.device)
    context.report.fact("returning", str(size.turns))
    context.report.fact("preempted", str(size.single))
    rounds = Rounds(context, size, named(context, LOADS))
    run_in_groups(context, sides, [64, 64], rounds.run)
    for load, figures in rounds.figures.items():
        finish(context, load, figures)


def named(context: Context, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that were asked for; all where none was."""
    return [name for name in names if name in context.parts] or list(names)


class Rounds:
    """The loads on engines in turn.

    Attributes:
        figures: figures of each load and side, round by round.
    """

    def __init__(self, context: Context, size: Size, loads: list[str]) -> None:
        """No engine has run."""
        self.figures: dict[str, dict[str, list[Figures]]] = {load: {} for load in loads}
        self._context = context
        self._size = size
        self._rate: float | None = None

    def run(self, running: Mapping[str, EngineProcess]) -> None:
        """Each load on each engine, in another order each round; other chats each round."""
        names, longest = list(running), 0.0
        if names and "preempted" in self.figures and self._rate is None:
            self._find_rate(running)
        for index in range(self._size.repeats):
            for load, figures in self.figures.items():
                what = f"{load}, round {index + 1}"
                if not self._context.has_time(1.2 * longest * len(names), what):
                    return
                turn = index % max(1, len(names))
                for name in names[turn:] + names[:turn]:
                    try:
                        found = running[name].ask("chats", load=self._spec(load, index))
                    except EngineError as error:
                        self._context.report.check(f"{name} serves", str(error), "serves", False)
                        names.remove(name)
                        continue
                    longest = max(longest, found["seconds"])
                    figures.setdefault(name, []).append(found)
                    row = tidy(found)
                    self._context.report.row(f"{load}: runs", name=name, round=index + 1, **row)

    def _find_rate(self, running: Mapping[str, EngineProcess]) -> None:
        """RATE_SHARE of the chats that an engine with KV memory for all answers a second."""
        name = next((name for name in ("stock_all", "pie") if name in running), next(iter(running)))
        try:
            found = running[name].ask("chats", load=self._spec("preempted", self._size.repeats))
        except EngineError as error:
            self._context.report.note(f"no rate was found, chats come at once: {error}")
            return
        self._rate = RATE_SHARE * float(found["requests_s"])
        self._context.report.fact("preempted, chats a second", self._rate)
        self._context.report.fact("preempted, rate found with", name)

    def _spec(self, load: str, index: int) -> dict[str, Any]:
        """What `parking_run` takes."""
        if load == "returning":
            return {"turns": asdict(replace(self._size.turns, seed=index)), "rate": None}
        single = replace(self._size.single, seed=index)
        return {"single": asdict(single), "rate": self._rate}


def tidy(found: Figures) -> dict[str, Any]:
    """Bytes as MiB; the columns of every row alike."""
    row = {key: found[key] for key in (*COMPARED, *COUNTED, "prompt_tokens", *TIERS)}
    row |= {key.replace("bytes_", "") + "_MiB": found[key] / 2**20 for key in MOVED}
    return row | {"seconds": found["seconds"]}


def finish(context: Context, load: str, figures: Mapping[str, list[Figures]]) -> None:
    """Medians, ratios of runs of the same round, and what must hold of them."""
    report = context.report
    for name, runs in figures.items():
        rows = [tidy(run) for run in runs]
        medians = {key: spread([row[key] for row in rows]).median for key in rows[0]}
        report.row(f"{load}: medians", name=name, runs=len(runs), **medians)
    for above, below in PAIRS:
        ratios = {key: paired(figures, above, below, key) for key in (*COMPARED, "prefill_tokens")}
        row = {key: ratio.text(3) for key, ratio in ratios.items() if ratio is not None}
        if row:
            table = f"{load}: ratios, paired by round: median [least .. most]"
            report.row(table, ratio=f"{above} / {below}", **row)
    for question in (*AIMS, *(MUST if load == "returning" else ())):
        ratio = paired(figures, question.above, question.below, question.key)
        if ratio is not None:
            asked = f"{'<=' if question.less else '>='} {question.asked}"
            good = question.reached(ratio.median)
            name = f"{load}: {question.name}"
            report.check(name, ratio.median, asked, good, target=question in AIMS)
    runs = figures.get("pie", [])
    if runs and load == "returning":
        least = min(run["bytes_restored"] for run in runs)
        report.check(f"{load}: bytes that pie restored, least", least, "> 0", least > 0)
    if runs and load == "preempted":
        most = max(run["recomputed_tokens"] for run in runs)
        report.check(f"{load}: tokens that pie recomputed, most", most, "0", most == 0, target=True)


def paired(figures: Mapping[str, list[Figures]], above: str, below: str, key: str) -> Spread | None:
    """The ratio of two sides in the rounds that both had; None where there is none."""
    rounds = list(zip(figures.get(above, ()), figures.get(below, ()), strict=False))
    if not rounds:
        return None
    return paired_ratio([a[key] for a, _ in rounds], [b[key] for _, b in rounds])


def choose(context: Context, size: Size) -> dict[str, Side]:
    """The sides that were asked for; without a GPU those that a CPU has."""
    # Of a vocabulary that has the words of the chats.
    shape = TINY._replace(vocab=LAST_TOKEN) if context.dry else EIGHT_B
    folder = write_config(context.scratch / "models" / f"chats-{shape.layers}", shape)
    element, block = (4, 32) if context.dry else (2, 16)
    block_bytes = shape.layers * shape.page_bytes(block, element)
    device = size.device // block * block_bytes
    most = max(load.chats * -(-load.longest // block) for load in (size.turns, size.single))
    everything = (most + SPARE_BLOCKS) * block_bytes
    longest = max(size.turns.longest, size.single.longest) + block
    pool = everything / GIB
    # Without a GPU two cores run four engines: what they learn of times means nothing.
    pie = {"pool_gib": pool, **({"target_slowdown": "off"} if context.dry else {})}
    weights = shape.layers * shape.layer_bytes + 4 * shape.vocab * shape.hidden

    def side(kv: int, pie: dict[str, Any] | None = None, **more: Any) -> Side:
        llm = common(context, str(folder), kv, longest) | {"enable_prefix_caching": True} | more
        return Side(llm, pie, weights + kv, in_one_process(True))

    found = {
        "stock": side(device),
        "pie": side(device, pie),
        "connector": side(device, kv_offloading_size=pool),
        "pie_off": side(device, {**pie, "parking": "off"}),
        "stock_all": side(everything),
    }
    if context.dry:
        found.pop("connector")
        context.report.note("without a GPU: no connector")
    elif "connector" in missing_arguments():
        found.pop("connector")
        context.report.note("connector: this vLLM has no such arguments")
    return {name: side for name, side in found.items() if name in named(context, SIDES)}

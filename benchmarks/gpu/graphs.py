"""Are idle steps as long as stock's (FULL graphs kept), and streaming ones within 1 %?

Stock and pie serve the same chats and take turns of a few decode steps, each in a process of its
own, so that the drift of a machine cancels. Idle: both have device memory for all chats. Streaming:
pie has less, by what its link brings in half a step, and its controller decides how much it loads;
its steps are compared with those of stock with all KV on the device, for steps in which all chats
ran. As contexts grow by more than that, chats begin anew in each streaming turn. Stock runs its
default graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.harness.compute import granularity, middle
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.engines import EngineProcess
from benchmarks.gpu.harness.models import EIGHT_B, TINY, Shape, write_config
from benchmarks.gpu.harness.sides import Side, common, engines, in_one_process
from benchmarks.harness.stats import paired_ratio
from pie_vllm.transfer.calibration import measure_link

IDLE, STREAMING = 1.005, 1.01
"""Steps of pie beside stock's, at most."""

DROPPED = 2
"""First steps of a turn, which hold what came before it."""

LINK_SHARE = 0.5
"""Of what the link brings in a step, KV that does not fit the device."""

RING_SLOTS = 3


class Load(NamedTuple):
    """Chats and steps.

    Attributes:
        chats: how many.
        prompt: tokens of each.
        turn: steps of a turn.
        turns: of each side.
        settle: streaming turns before those, in which the controller learns.
    """

    chats: int = 32
    prompt: int = 2000
    turn: int = 40
    turns: int = 16
    settle: int = 8


QUICK = Load(32, 1000, 40, 5, 3)
DRY = Load(4, 400, 8, 2, 1)


class Bench:
    """Sizes, and turns of engines.

    Attributes:
        load: chats and steps.
        shape: of the model.
        block: tokens of a block.
        block_bytes: of a block in all layers.
        longest: tokens of a chat at the end of the idle turns.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.load = DRY if context.dry else QUICK if context.quick else Load()
        self.shape: Shape = TINY if context.dry else EIGHT_B
        self.block, element = (32, 4) if context.dry else (16, 2)
        self.block_bytes = self.shape.layers * self.shape.page_bytes(self.block, element)
        load = self.load
        self.longest = load.prompt + (load.turns + 3) * load.turn + 64
        folder = f"shape-{self.shape.layers}"
        self._model = write_config(context.scratch / "models" / folder, self.shape)

    def side(self, blocks: int, pie: dict[str, Any] | None) -> Side:
        """A side with KV memory for so many blocks."""
        kv = blocks * self.block_bytes
        llm = common(self.context, str(self._model), kv, self.longest)
        llm["max_num_seqs"] = self.load.chats
        llm["enable_prefix_caching"] = False
        if not self.context.dry:
            llm["cudagraph_metrics"] = True
        return Side(llm, pie, kv, in_one_process(True))

    def blocks(self, tokens: int) -> int:
        """That all chats hold with so many tokens each."""
        return self.load.chats * -(-tokens // self.block)

    def begin(self, engine: EngineProcess, tokens: int) -> None:
        """Let an engine take the chats' prompts, in place of what it had."""
        load = self.load
        engine.ask("abort")
        engine.ask("add", lengths=[load.prompt] * load.chats, tokens=tokens, seed=3)
        engine.ask("prefill", requests=load.chats)

    def turns(
        self, running: Mapping[str, EngineProcess], count: int, anew: bool = False
    ) -> dict[str, list[dict[str, Any]]]:
        """Turns of all engines, their order changed each time; with chats that begin anew in each.

        A turn of chats that began anew ends before the first of them does.
        """
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        names = list(running)
        for _ in range(count):
            names.reverse()
            for name in names:
                if anew:
                    self.begin(running[name], 4 * self.load.turn)
                found[name].append(running[name].ask("steps", count=self.load.turn))
            if not self.context.has_time(5, "all turns"):
                break
        return found


def run(context: Context) -> None:
    """Idle steps, then streaming ones, beside one stock engine."""
    bench = Bench(context)
    all_blocks = bench.blocks(bench.longest) + 3 * bench.load.chats + 64
    link = 0.0
    if context.wants("streaming"):
        page = bench.block_bytes // bench.shape.layers
        unit = granularity(context.driver)
        measured = measure_link(bench.shape.layers, page, granularity=unit, driver=context.driver)
        link = measured.load
        context.report.fact("link to the device, GB/s", link / 1e9)
    sides = {"stock_all": bench.side(all_blocks, None)}
    if context.wants("idle"):
        small = 64 * bench.block_bytes / 2**30
        sides["pie_idle"] = bench.side(all_blocks, {"pool_gib": small})
    with engines(context, sides, [32, 32]) as running:
        if "stock_all" not in running:
            return
        for engine in running.values():
            bench.begin(engine, bench.longest - bench.load.prompt)
        bench.turns(running, 1)
        found = bench.turns(running, bench.load.turns if context.wants("idle") else 3)
        if "pie_idle" in found:
            report_idle(context, found)
            running.pop("pie_idle").close()
        if context.wants("streaming"):
            step = middle([seconds for seconds, _ in steps_of(found["stock_all"])])
            context.report.fact("stock's step, ms", 1e3 * step)
            streaming(context, bench, running, link, step)


def streaming(
    context: Context,
    bench: Bench,
    running: dict[str, EngineProcess],
    link: float,
    step: float,
) -> None:
    """Pie with less device memory beside the stock engine that runs."""
    # In the middle of a turn, chats hold so many blocks.
    held = bench.blocks(bench.load.prompt + bench.load.turn // 2)
    lacking = min(max(4, int(LINK_SHARE * link * step / bench.block_bytes)), held // 4)
    # The ring takes its part of the device's bytes: so many blocks are resident beside it.
    window = 2 * lacking + bench.load.chats
    ring = -(-RING_SLOTS * window // bench.shape.layers)
    blocks = held - lacking + ring
    context.report.fact("blocks that all chats hold in the middle of a turn", held)
    context.report.fact("blocks of them that pie's device memory lacks", lacking)
    pie = {
        "pool_gib": (window + 0.5) * bench.block_bytes / 2**30,
        "ring_slots": RING_SLOTS,
        "ring_fraction": (RING_SLOTS * window + 1) / (bench.shape.layers * blocks),
    }
    with engines(context, {"pie": bench.side(blocks, pie)}, [32, 32]) as more:
        if "pie" not in more:
            return
        both = {"stock_all": running["stock_all"], "pie": more["pie"]}
        bench.turns(both, bench.load.settle, anew=True)
        found = bench.turns(both, bench.load.turns, anew=True)
    report_streaming(context, bench, found, link)


def steps_of(
    turns: Sequence[Mapping[str, Any]], answers: int | None = None
) -> list[tuple[float, int]]:
    """Steps without the first of each turn; only those with so many answers."""
    kept = [step for turn in turns for step in turn["steps"][DROPPED:]]
    return [(s, n) for s, n in kept if answers is None or n == answers]


def medians(turns: Sequence[Mapping[str, Any]], answers: int | None = None) -> list[float]:
    """The median step of each turn."""
    return [middle([seconds for seconds, _ in steps_of([turn], answers)]) for turn in turns]


def modes_of(turns: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Steps by graph mode."""
    found: dict[str, int] = {}
    for turn in turns:
        for mode, count in turn["modes"].items():
            found[mode] = found.get(mode, 0) + count
    return found


def report_idle(context: Context, found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Steps of idle pie beside stock's."""
    ratio = paired_ratio(medians(found["pie_idle"]), medians(found["stock_all"]))
    for name, turns in found.items():
        steps = [seconds for seconds, _ in steps_of(turns)]
        context.report.row(
            "idle: decode steps with all KV on the device",
            name=name,
            steps=len(steps),
            median_ms=1e3 * middle(steps),
            graph_modes=str(modes_of(turns)),
            stored_MiB=sum(turn.get("bytes_stored", 0) for turn in turns) / 2**20,
        )
    context.report.check(
        "idle step of pie beside stock's",
        ratio.text(4),
        f"<= {IDLE}",
        ratio.median <= IDLE,
        target=True,
    )
    ours, theirs = modes_of(found["pie_idle"]), modes_of(found["stock_all"])
    if theirs:
        same = set(ours) == set(theirs)
        context.report.check("graph modes of idle pie", sorted(ours), str(sorted(theirs)), same)
    elif not context.dry:
        context.report.note("vLLM reported no graph modes")


def report_streaming(
    context: Context, bench: Bench, found: Mapping[str, list[dict[str, Any]]], link: float
) -> None:
    """Steps of streaming pie beside stock's with all KV on the device, all chats running."""
    chats = bench.load.chats
    for name, turns in found.items():
        whole, steps = steps_of(turns, chats), steps_of(turns)
        count = max(1, sum(len(turn["steps"]) for turn in turns))
        loaded = sum(turn.get("bytes_loaded", 0) for turn in turns)
        taken = sum(seconds for turn in turns for seconds, _ in turn["steps"])
        context.report.row(
            "streaming: decode steps, pie with less device memory",
            name=name,
            steps=len(steps),
            with_all_chats=len(whole),
            median_ms=1e3 * middle([seconds for seconds, _ in steps]),
            median_with_all_ms=1e3 * middle([seconds for seconds, _ in whole]),
            loaded_MiB_a_step=loaded / count / 2**20,
            share_of_link=loaded / (link * taken),
            steps_with_plan=sum(t.get("steps_with_plan", 0) for t in turns),
            stall_ms_a_step=1e3 * sum(t.get("stall_seconds", 0.0) for t in turns) / count,
            graph_modes=str(modes_of(turns)),
        )
    loaded = sum(turn.get("bytes_loaded", 0) for turn in found["pie"])
    context.report.check(
        "bytes loaded while streaming", loaded, "> 0", loaded > 0, target=context.dry
    )
    pairs = [
        (a, b)
        for a, b in zip(
            medians(found["pie"], chats), medians(found["stock_all"], chats), strict=False
        )
        if a == a and b == b  # Turns without a step of all chats have none.
    ]
    if not pairs:
        context.report.note("no step of pie ran all chats: requests took turns")
        return
    ratio = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    name = "streaming step of pie beside stock's, all chats running"
    ok = ratio.median <= STREAMING
    context.report.check(name, ratio.text(4), f"<= {STREAMING}", ok, target=True)

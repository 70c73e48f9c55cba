"""Are idle steps as long as stock's (FULL graphs kept), and streaming ones within 1 %?

Stock and pie serve the same chats and take turns of a few decode steps, each in a process of its
own, so that the drift of a machine cancels. Idle: both have device memory for all chats. Streaming:
pie has less, by what its link brings in half a step, and its controller decides how much it loads;
its steps are compared with those of stock with all KV on the device, for steps in which all chats
ran. As contexts grow by more than that, chats begin anew in each streaming turn. Full: the same
with --pie-full-graphs, so that these steps run in FULL graphs as stock's do. Stock runs its default
graphs.
Engine: the transfer engine's copies in a graph without vLLM (`graph_steps.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.gpu import graph_steps
from benchmarks.gpu.graph_reports import report_idle, report_streaming, steps_of
from benchmarks.gpu.harness.compute import granularity, middle
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.engines import EngineProcess
from benchmarks.gpu.harness.models import EIGHT_B, TINY, Shape, write_config
from benchmarks.gpu.harness.sides import Side, common, engines, in_one_process
from pie_vllm.engine.link_calibration import measure_link

STREAMING_SIDES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("streaming", "pie", {}),
    ("full", "pie_full", {"full_graphs": True}),
)
"""Part of the stage, name of the side, and its settings beside those of all."""

LINK_SHARE = 0.5
"""KV that does not fit the device, as a share of what the link brings in a step."""

RING_SLOTS = 3


class Load(NamedTuple):
    """Chats and steps.

    Attributes:
        chats: how many.
        prompt: tokens of each.
        turn: steps of a turn.
        turns: number of turns of each side.
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
        shape: shape of the model.
        block: tokens of a block.
        block_bytes: bytes of a block in all layers.
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
        """Blocks that all chats hold with so many tokens each."""
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
    """Copies in a graph of the engine's own; then vLLM's."""
    if context.wants("engine"):
        graph_steps.run(context)
    if any(context.wants(part) for part in ("idle", "streaming", "full")):
        vllm_steps(context)


def vllm_steps(context: Context) -> None:
    """Idle steps, then streaming ones, beside one stock engine."""
    bench = Bench(context)
    all_blocks = bench.blocks(bench.longest) + 3 * bench.load.chats + 64
    link = 0.0
    streams = [each for each in STREAMING_SIDES if context.wants(each[0])]
    if context.dry and "full" in [part for part, _, _ in streams]:
        context.report.note("without a GPU: no steps that stream in FULL graphs")
        streams = [each for each in streams if each[0] != "full"]
    if streams:
        page = bench.block_bytes // bench.shape.layers
        unit = granularity(context.driver)
        measured = measure_link(bench.shape.layers, page, granularity=unit, driver=context.driver)
        link = measured.load
        context.report.fact("link to the device, GB/s", link / 1e9)
    sides = {"stock_all": bench.side(all_blocks, None)}
    if context.wants("idle"):
        small = 64 * bench.block_bytes / 2**30
        sides["pie_idle"] = bench.side(all_blocks, {"pool_gib": small})
        if not context.dry:
            full = {"pool_gib": small, "full_graphs": True}
            sides["pie_idle_full"] = bench.side(all_blocks, full)
    with engines(context, sides, [32, 32]) as running:
        if "stock_all" not in running:
            return
        for engine in running.values():
            bench.begin(engine, bench.longest - bench.load.prompt)
        bench.turns(running, 1)
        found = bench.turns(running, bench.load.turns if context.wants("idle") else 3)
        for name in ("pie_idle", "pie_idle_full"):
            if name in found:
                report_idle(context, {"stock_all": found["stock_all"], name: found[name]}, name)
                running.pop(name).close()
        if streams:
            step = middle([seconds for seconds, _ in steps_of(found["stock_all"])])
            context.report.fact("stock's step, ms", 1e3 * step)
            for number, (_, name, more) in enumerate(streams):
                if number and not context.has_time(150, name):
                    break
                streaming(context, bench, running, link, step, name, more)


def streaming(
    context: Context,
    bench: Bench,
    running: dict[str, EngineProcess],
    link: float,
    step: float,
    name: str,
    settings: dict[str, Any],
) -> None:
    """Pie with less device memory, and these settings, beside the stock engine that runs."""
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
        **settings,
    }
    with engines(context, {name: bench.side(blocks, pie)}, [32, 32]) as more:
        if name not in more:
            return
        both = {"stock_all": running["stock_all"], name: more[name]}
        bench.turns(both, bench.load.settle, anew=True)
        found = bench.turns(both, bench.load.turns, anew=True)
    report_streaming(context, bench.load.chats, found, link, name)

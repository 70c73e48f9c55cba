"""Throughput, TPOT and TTFT at equal GPU bytes: stock, pie, and vLLM's own offloading.

Chats with random prompts, all there from the start, whose KV is twice what `stock` has on the
device. Dummy weights of Llama-3-8B's shape; answers are not compared here (`exactness` does that).

    stock       the device's KV bytes, vLLM's default graphs (FULL_AND_PIECEWISE); preempts
    pie         the same bytes, ring included, and a CPU pool: streams
    pie_full    as pie, with --pie-full-graphs: steps that only decode stream in FULL graphs
    piecewise   as stock, with PIECEWISE graphs
    connector   as stock, with --kv-offloading-size: vLLM keeps KV in CPU memory, but runs on device
    prefetch    as stock, with weights of some layers in CPU memory and their bytes used for KV
    stock_all   KV bytes for every chat
    pie_idle    the same bytes as stock_all, with pie, which pools nothing then
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.engines import EngineError, EngineProcess
from benchmarks.gpu.harness.models import EIGHT_B, TINY, Shape, write_config
from benchmarks.gpu.harness.sides import Side, common, in_one_process, run_in_groups
from benchmarks.harness.stats import paired_ratio, spread

GIB = 1 << 30
PAIRS = (
    ("pie", "stock"),
    ("pie_full", "stock"),
    ("pie_full", "pie"),
    ("piecewise", "stock"),
    ("connector", "stock"),
    ("prefetch", "stock"),
    ("stock_all", "stock"),
    ("pie_idle", "stock_all"),
)
FIGURES = ("tok_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p50_ms")

NEED_A_GPU = ("pie_full", "piecewise", "connector", "prefetch")

GROUP_LAYERS = 8
"""vLLM's weight prefetch keeps the last layer of each so many in CPU memory."""

PREFETCH_SLOTS = 1
"""Layers whose weights the device has room for then."""


class Load(NamedTuple):
    """Chats of one size.

    Attributes:
        chats: how many.
        shortest, longest: prompts.
        tokens: number of tokens of each answer.
        repeats: number of runs of the whole load.
    """

    chats: int = 96
    shortest: int = 500
    longest: int = 2000
    tokens: int = 256
    repeats: int = 5


QUICK = Load(32, 500, 2000, 96, 2)
DRY = Load(6, 40, 120, 12, 2)


def run(context: Context) -> None:
    """All sides, as many at once as fit the device."""
    load = DRY if context.dry else QUICK if context.quick else Load()
    shape = TINY if context.dry else EIGHT_B
    lengths = random.Random(7).choices(range(load.shortest, load.longest), k=load.chats)
    sides = choose(context, shape, load, lengths)
    context.report.fact("chats", load.chats)
    context.report.fact("tokens of prompts", sum(lengths))
    context.report.fact("tokens of answers", load.chats * load.tokens)
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}

    def run_rounds(running: Mapping[str, EngineProcess]) -> None:
        rounds(context, running, load, lengths, figures)

    run_in_groups(context, sides, lengths[:2], run_rounds)
    finish(context, figures)


def rounds(
    context: Context,
    running: Mapping[str, EngineProcess],
    load: Load,
    lengths: list[int],
    figures: dict[str, list[dict[str, Any]]],
) -> None:
    """The load on each engine in turn, in another order each round; other prompts each round."""
    names, longest = list(running), 0.0
    for index in range(load.repeats):
        if index and not context.has_time(1.2 * longest * len(names), f"round {index + 1}"):
            return
        turn = index % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            try:
                found = running[name].ask("load", lengths=lengths, tokens=load.tokens, seed=index)
            except EngineError as error:
                context.report.check(f"{name} serves", str(error), "serves", False)
                names.remove(name)
                continue
            longest = max(longest, found["seconds"])
            figures[name].append(found)
            context.report.row("runs", name=name, round=index + 1, **tidy(found))


def tidy(found: dict[str, Any]) -> dict[str, Any]:
    """Bytes as MiB; the columns of every row alike."""
    row = {key: found[key] for key in (*FIGURES, "itl_p99_ms", "preemptions", "pooled_peak")}
    for key, name in (("bytes_loaded", "loaded_MiB"), ("bytes_stored", "stored_MiB")):
        row[name] = found.get(key, 0) / 2**20
    for key in ("stall_seconds", "load_seconds", "graph_steps"):
        row[key] = found.get(key, 0)
    return row | {"seconds": found["seconds"]}


def finish(context: Context, figures: Mapping[str, list[dict[str, Any]]]) -> None:
    """Medians, and ratios of runs of the same round."""
    for name, runs in figures.items():
        if runs:
            medians = {key: spread([run[key] for run in runs]).median for key in FIGURES}
            context.report.row("medians", name=name, runs=len(runs), **medians)
    for above, below in PAIRS:
        count = min(len(figures.get(above, ())), len(figures.get(below, ())))
        if not count:
            continue
        row: dict[str, Any] = {"ratio": f"{above} / {below}", "rounds": count}
        for key in ("tok_s", "tpot_p50_ms", "ttft_p50_ms"):
            values = ([run[key] for run in figures[name][:count]] for name in (above, below))
            row[key] = paired_ratio(*values).text(3)
        context.report.row("ratios, paired by round: median [least .. most]", **row)
    for name, key in (
        ("pie", "bytes_loaded"),
        ("pie_full", "bytes_loaded"),
        ("pie_full", "graph_steps"),
    ):
        moved = [run.get(key, 0) for run in figures.get(name, ())]
        if moved:
            context.report.check(f"{name}: {key}, least", min(moved), "> 0", min(moved) > 0)
    moved = [run.get("bytes_stored", 0) for run in figures.get("pie_idle", ())]
    if moved:
        context.report.check("bytes that idle pie stored", max(moved), "0", max(moved) == 0)


def choose(context: Context, shape: Shape, load: Load, lengths: list[int]) -> dict[str, Side]:
    """The sides that were asked for; without a GPU those that a CPU has."""
    folder = write_config(context.scratch / "models" / f"shape-{shape.layers}", shape)
    element, block = (4, 32) if context.dry else (2, 16)
    block_bytes = shape.layers * shape.page_bytes(block, element)
    blocks = sum(-(-(length + load.tokens) // block) + 1 for length in lengths)
    # Some to spare: pie moves blocks once fewer are free than there are requests.
    everything = (blocks + 3 * load.chats + 64) * block_bytes
    half = blocks // 2 * block_bytes
    longest = load.longest + load.tokens + block
    pool = everything / GIB
    weights = shape.layers * shape.layer_bytes + 4 * shape.vocab * shape.hidden

    def side(kv: int, pie: dict[str, Any] | None = None, **more: Any) -> Side:
        llm = common(context, str(folder), kv, longest) | more
        return Side(llm, pie, weights + kv, in_one_process(context.dry))

    offloaded = shape.layers // GROUP_LAYERS
    freed = max(0, offloaded - PREFETCH_SLOTS) * shape.layer_bytes
    found = {
        "stock": side(half),
        "pie": side(half, {"pool_gib": pool}),
        "pie_full": side(half, {"pool_gib": pool, "full_graphs": True}),
        "piecewise": side(half, compilation_config={"cudagraph_mode": "PIECEWISE"}),
        "stock_all": side(everything),
        "pie_idle": side(everything, {"pool_gib": pool / 4}),
        "connector": side(half, kv_offloading_size=pool),
        "prefetch": side(
            half + freed,
            offload_backend="prefetch",
            offload_group_size=GROUP_LAYERS,
            offload_prefetch_step=PREFETCH_SLOTS,
        ),
    }
    if context.dry:
        for name in NEED_A_GPU:
            found.pop(name)
        context.report.note(f"without a GPU: no {', '.join(NEED_A_GPU)}")
    missing = [name for name in missing_arguments() if name in found]
    for name in missing:
        found.pop(name)
        context.report.note(f"{name}: this vLLM has no such arguments")
    return {name: side for name, side in found.items() if context.wants(name)}


def missing_arguments() -> list[str]:
    """Sides whose engine arguments the installed vLLM lacks."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    needed = {
        "connector": {"kv_offloading_size"},
        "prefetch": {"offload_backend", "offload_group_size", "offload_prefetch_step"},
    }
    return [name for name, arguments in needed.items() if not arguments <= known]

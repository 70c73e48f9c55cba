"""Are vLLM's tokens and logprobs with pie those of stock vLLM, bit for bit?

Each setting runs pie with few resident blocks, then stock with as many all on the device, on the
same schedule, which is compared too. Where answers differ, stock runs once more, default graphs
as PIECEWISE ones (attention in a FULL graph may sum in another order): a stock that differs from
itself shows nothing of pie. One more run leaves loads out on purpose, by gates and in graphs (mode
"full", --pie-full-graphs): its answers must differ, or equal ones would mean nothing.
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu.harness.compute import granularity
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.engines import EngineError, EngineProcess
from benchmarks.gpu.harness.models import TINY, WINDOWS, Shape, small_model, write_random
from pie_vllm.geometry import round_up

REFUSED = "--block-manager pie does not support"
ENGINE_SECONDS, DRY_SECONDS = 75, 15
"""Time that one engine is counted on for, start and answers, in seconds."""

ENGINE_SHARE = 0.25
"""At most, of a limit: a comparison of two engines is begun under any."""

AT_ONCE = 4
FACETS = (
    ("v1", "v2"),
    ("flash_attn", "triton_attn", "flashinfer"),
    ("float32", "bfloat16"),
    ("eager", "piecewise", "compiled", "full"),
    ("sync", "async"),
    ("plain", "windows"),
)


class Setting(NamedTuple):
    """What stock and pie both run with.

    Attributes:
        runner: model runner, "v1" or "v2".
        backend: name of the attention backend.
        dtype: number format of weights and KV.
        mode: "eager", "piecewise" graphs, "compiled" for vLLM's default ones, or "full" for these
            with pie's copies in FULL graphs.
        steps: "async" with two steps in flight, or "sync".
        layers: "windows" where two of three layers have a sliding window, or "plain".
    """

    runner: str
    backend: str
    dtype: str
    mode: str
    steps: str
    layers: str = "plain"

    @property
    def name(self) -> str:
        """In words."""
        return " ".join(self).removesuffix(" plain")


# FlashAttention and FlashInfer have no float32.
SETTINGS = tuple(
    Setting(*words.split())
    for words in (
        "v2 flash_attn bfloat16 compiled sync",
        "v2 flash_attn bfloat16 full async",
        "v2 triton_attn float32 compiled sync",
        "v2 flash_attn bfloat16 piecewise sync",
        "v1 flash_attn bfloat16 full sync",
        "v2 triton_attn float32 full sync",
        "v1 flash_attn bfloat16 compiled sync",
        "v2 flash_attn bfloat16 compiled async",
        "v1 triton_attn float32 eager sync",
        "v2 flashinfer bfloat16 compiled sync",
        "v2 flash_attn bfloat16 eager async",
        "v1 flash_attn bfloat16 piecewise async",
        "v1 flashinfer bfloat16 compiled sync",
        "v2 triton_attn bfloat16 compiled async",
        "v2 triton_attn float32 eager async",
        "v1 triton_attn bfloat16 compiled async",
        "v2 flashinfer bfloat16 full async",
        "v1 triton_attn float32 full async",
        "v2 flash_attn bfloat16 compiled sync windows",
        "v1 triton_attn float32 eager sync windows",
    )
)
DEFAULT_GRAPHS = ("compiled", "full")
DRY = Setting("v1", "cpu_attn", "float32", "eager", "sync")
QUICK = 4


class Job(NamedTuple):
    """What all engines of one model share.

    Attributes:
        context: context of the stage.
        model: its folder.
        shape: its sizes.
        lengths: lengths of the prompts, in tokens.
        tokens: number of tokens of each answer.
        pooled: blocks that can be pooled.
        resident: blocks that are resident at least.
        unit: what the driver maps in one piece.
    """

    context: Context
    model: str
    shape: Shape
    lengths: list[int]
    tokens: int
    pooled: int
    resident: int
    unit: int


BLOCK, SLOTS = 32, 3


def run(context: Context) -> None:
    """All settings, several at once."""
    wanted = choose(context)
    kinds = dict.fromkeys(setting.layers for setting in wanted)
    jobs = {layers: job_of(context, layers) for layers in kinds}
    compared = 0
    workers = 1 if context.dry else max(1, min(AT_ONCE, (os.cpu_count() or 1) // 3))
    with ThreadPoolExecutor(workers) as pool:
        # The control comes second: without it the others mean nothing.
        work = [partial(compare, jobs[setting.layers], setting) for setting in wanted]
        if context.wants("control") or not any(p for p in context.parts if p != "control"):
            full = [setting for setting in wanted if setting.mode == "full"]
            for setting in dict.fromkeys([*full[:1], wanted[0]]):
                work.insert(1, partial(control, jobs[setting.layers], setting))
        for done in as_completed([pool.submit(each) for each in work]):
            compared += done.result()
    context.report.check("settings compared", compared, ">= 1", compared >= 1)


def job_of(context: Context, layers: str) -> Job:
    """What engines of a model with such layers share; writes the model."""
    folder, shape, what = small_model(context.scratch)
    if layers == "windows":
        shape = TINY._replace(layers=12, window=64, full_every=3) if context.dry else WINDOWS
        folder = write_random(context.scratch / "models" / "random-windows", shape)
        what = f"random weights, {shape.full_layers} of {shape.layers} layers without a window"
    elif context.dry and context.quick:
        folder, shape = write_random(context.scratch / "models" / "random-tiny", TINY), TINY
        what = "random weights, tiny"
    context.report.fact("model" if layers == "plain" else f"model, {layers}", what)
    random_ = random.Random(4)
    count = 12 if context.dry else 24
    lengths = [random_.randrange(96, 224) for _ in range(count)]
    pooled, resident = (80, 36) if context.dry else (170, 43)
    resident += count * shape.window_blocks(BLOCK)
    unit = granularity(context.driver)
    return Job(context, str(folder), shape, lengths, 64, pooled, resident, unit)


def choose(context: Context) -> list[Setting]:
    """The settings that were asked for; of each facet all values where none was named."""
    if context.dry:
        return [DRY._replace(layers="windows" if "windows" in context.parts else "plain")]
    found = list(SETTINGS)
    for place, facet in enumerate(FACETS):
        named = [part for part in context.parts if part in facet]
        if named:
            found = [setting for setting in found if setting[place] in named]
    return found[:QUICK] if context.quick else found


def engine_seconds(context: Context) -> float:
    """Time that an engine is counted on for under this stage's limit, in seconds."""
    known = DRY_SECONDS if context.dry else ENGINE_SECONDS
    return min(known, ENGINE_SHARE * context.limit)


def compare(job: Job, setting: Setting) -> int:
    """Run pie, then stock, and report; returns 1 where the comparison shows something."""
    report, begin = job.context.report, time.monotonic()
    if setting.backend == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
        report.note(f"{setting.name}: FlashInfer is not installed")
        return 0
    if not job.context.has_time(2 * engine_seconds(job.context), setting.name):
        return 0
    pie = attempt(job, setting, "pie")
    # Where pie does not start, does stock?
    stock = attempt(job, setting, "stock", pie.get("num_blocks", job.pooled + job.resident))
    if "error" in stock:
        report.note(f"{setting.name}: stock vLLM does not run so: {stock['error']}")
        return 0
    if "error" in pie:
        if REFUSED in pie["error"]:
            report.note(f"{setting.name}: refused: {pie['error']}")
            return 0
        report.check(f"{setting.name}: pie answers", pie["error"], "answers", False)
        return 0
    equal = pie["answers"] == stock["answers"]
    same = pie["schedule"] == stock["schedule"]
    itself: bool | None = None
    if not equal and job.context.has_time(
        engine_seconds(job.context), f"stock once more, {setting.name}"
    ):
        mode = "piecewise" if setting.mode in DEFAULT_GRAPHS else setting.mode
        again = attempt(job, setting._replace(mode=mode), "stock", pie["num_blocks"])
        itself = again.get("answers") == stock["answers"]
    tokens = equal_tokens(pie, stock)
    report.row(
        "settings",
        **setting._asdict(),
        runs=f"{pie['about']['runner']} {' '.join(pie['about']['backends'])} "
        f"{pie['about']['cudagraph_mode']}",
        equal_tokens=f"{tokens} of {len(job.lengths)}",
        equal_logprobs=equal,
        same_schedule=same,
        stock_equals_itself=itself,
        different_answers=len({tuple(answer["tokens"]) for answer in stock["answers"]}),
        pooled_peak=pie["pooled_peak"],
        blocks=pie["num_blocks"],
        loaded_MiB=pie["moved"]["bytes_loaded"] / 2**20,
        stored_MiB=pie["moved"]["bytes_stored"] / 2**20,
        gates=pie["gates"],
        graph_steps=pie["graph_steps"],
        seconds=time.monotonic() - begin,
    )
    found = "equal" if equal else f"{tokens} of {len(job.lengths)} answers have equal tokens"
    if itself is False:
        found += "; stock differs from itself too"
    shows = itself is not False
    name = f"{setting.name}: tokens and logprobs"
    report.check(name, found, "stock's", equal, target=not shows)
    runner = pie["about"]["runner"]
    report.check(f"{setting.name}: runner", runner, setting.runner, runner == setting.runner)
    report.check(f"{setting.name}: schedule", "same" if same else "another", "stock's", same)
    moved = min(pie["moved"].values())
    report.check(f"{setting.name}: least of bytes loaded, stored", moved, "> 0", moved > 0)
    if setting.mode == "full":
        count = pie["graph_steps"]
        report.check(f"{setting.name}: steps that loaded in FULL graphs", count, "> 0", count > 0)
    return int(shows)


def control(job: Job, setting: Setting) -> int:
    """Without its loads pie must answer otherwise."""
    if not job.context.has_time(2 * engine_seconds(job.context), "the control"):
        return 0
    good, bad = (attempt(job, setting, "pie", debug=debug) for debug in ((), ("skip_loads",)))
    if "error" in good or "error" in bad:
        job.context.report.note(f"no control: {good.get('error') or bad.get('error')}")
        return 0
    count = len(job.lengths) - equal_tokens(good, bad)
    name = f"{setting.name}: answers with other tokens where loads are left out"
    job.context.report.check(name, count, "> 0", count > 0)
    return 0


def equal_tokens(one: dict[str, Any], other: dict[str, Any]) -> int:
    """Answers whose tokens are the same."""
    pairs = zip(one["answers"], other["answers"], strict=True)
    return sum(a["tokens"] == b["tokens"] for a, b in pairs)


def attempt(
    job: Job, setting: Setting, kind: str, blocks: int = 0, debug: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The answers of one engine with `num_blocks` and `about`; `error` where it failed."""
    name = "-".join([*setting, kind, *debug, str(time.monotonic_ns())])
    log = job.context.scratch / "exactness" / f"{name}.log"
    spec: dict[str, Any] = {"llm": arguments(job, setting), "pie": None}
    element = {"float32": 4, "bfloat16": 2}[setting.dtype]
    page = job.shape.page_bytes(BLOCK, element)
    if kind == "stock":
        spec["llm"]["kv_cache_memory_bytes"] = blocks * job.shape.regions * page
    else:
        ring = round_up(job.pooled * page, job.unit) * SLOTS
        device = job.shape.regions * round_up(job.resident * page, job.unit) + ring
        spec["llm"]["kv_cache_memory_bytes"] = device
        spec["pie"] = {
            "pool_gib": (job.pooled + 0.5) * job.shape.regions * page / 2**30,
            "ring_slots": SLOTS,
            "ring_fraction": (SLOTS * job.pooled + 1) * page / device,
            "target_slowdown": "off",
            **({"debug": list(debug)} if debug else {}),
            **({"full_graphs": True} if setting.mode == "full" else {}),
        }
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not job.context.dry:
        environment["VLLM_USE_V2_MODEL_RUNNER"] = {"v1": "0", "v2": "1"}[setting.runner]
    try:
        with EngineProcess(spec, log, environment) as engine:
            about = engine.about
            found: dict[str, Any] = engine.ask(
                "answers", lengths=job.lengths, tokens=job.tokens, seed=11, logprobs=5
            )
    except EngineError as error:
        return {"error": str(error)}
    return {**found, "about": about, "num_blocks": about["num_blocks"]}


def arguments(job: Job, setting: Setting) -> dict[str, Any]:
    """What `vllm.LLM` is given, stock's and pie's alike."""
    llm: dict[str, Any] = {
        "model": job.model,
        "dtype": setting.dtype,
        "block_size": BLOCK,
        "max_model_len": 1024,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 32,
        "enforce_eager": setting.mode == "eager",
        "enable_prefix_caching": False,
        "async_scheduling": setting.steps == "async",
    }
    if not job.context.dry:
        llm |= {
            "attention_backend": setting.backend.upper(),
            "gpu_memory_utilization": 0.2,
            "max_cudagraph_capture_size": 64,
        }
        if setting.mode == "piecewise":
            llm["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    return llm

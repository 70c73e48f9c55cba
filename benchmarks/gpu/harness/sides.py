"""Engines that are compared: side by side where memory allows it, so that turns can alternate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.engines import EngineError, EngineProcess

SPARE_BYTES = 6 << 30
"""Memory of an engine beside weights and KV: activations, graphs, the CUDA context."""

MEMORY_SHARE_MAX = 0.92
"""Upper bound on the share of the device's memory that engines take together."""


class Side(NamedTuple):
    """One configuration.

    Attributes:
        llm: arguments of `vllm.LLM`.
        pie: arguments of `pie_vllm.engine_args`, or None.
        device_bytes: device memory that it takes for weights and KV.
        environment: beside the stage's.
    """

    llm: dict[str, Any]
    pie: dict[str, Any] | None
    device_bytes: int
    environment: dict[str, str]


def free_bytes(context: Context) -> int:
    """Memory of the device that is free; in a dry run there is always enough."""
    if context.dry:
        return 1 << 50
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free)


def groups(sides: Mapping[str, Side], room: int) -> list[list[str]]:
    """Names of sides that fit the device together, in order; one side at least a group."""
    found: list[list[str]] = []
    taken = 0
    for name, side in sides.items():
        needed = side.device_bytes + SPARE_BYTES
        if found and taken + needed <= MEMORY_SHARE_MAX * room:
            found[-1].append(name)
            taken += needed
        else:
            found.append([name])
            taken = needed
    return found


@contextmanager
def engines(
    context: Context, sides: Mapping[str, Side], warm_up: list[int]
) -> Iterator[dict[str, EngineProcess]]:
    """The engines of these sides, started at once; those that do not start are noted, not there."""
    with ExitStack() as stack:
        started = {}
        for name, side in sides.items():
            log = context.scratch / "engines" / f"{name}.log"
            spec = {"llm": side.llm, "pie": side.pie, "warm_up": warm_up}
            engine = EngineProcess(spec, log, side.environment)
            started[name] = stack.enter_context(engine)
        for engine in started.values():
            stack.callback(engine.hang_up)  # All at once, before any of them is waited for.
        ready = {}
        for name, engine in started.items():
            try:
                about = engine.about
            except EngineError as error:
                context.report.check(f"{name} starts", str(error), "starts", False)
                print(f"{name}:\n{engine.tail()}", flush=True)
                engine.close()
                continue
            pie = about.pop("pie")
            sizes = ("resident_blocks", "pooled_blocks", "ring_slots", "ring_bytes")
            context.report.row("engines", name=name, **about, **{k: pie.get(k) for k in sizes})
            ready[name] = engine
        yield ready


def common(context: Context, model: str, kv_bytes: int, longest: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that all sides share."""
    llm: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "dtype": "float32" if context.dry else "bfloat16",
        "block_size": 16 if not context.dry else 32,
        "max_model_len": longest,
        "kv_cache_memory_bytes": kv_bytes,
    }
    if context.dry:
        return {**llm, "enforce_eager": True}
    # A share that engines beside each other can all find free; the KV's size is given in bytes.
    return {**llm, "gpu_memory_utilization": 0.1}


def in_one_process(one: bool) -> dict[str, str]:
    """Whether the engine core runs in the engine's process, where each step can be asked for."""
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if one else "1"}


def run_in_groups(
    context: Context,
    sides: Mapping[str, Side],
    warm_up: list[int],
    run: Callable[[dict[str, EngineProcess]], None],
) -> None:
    """Call `run` with the engines of all sides, as many at once as fit the device."""
    together = groups(sides, free_bytes(context))
    if len(together) > 1:
        context.report.note(
            f"engines did not fit the device together: {together}; ratios between groups are not "
            "of runs that alternate"
        )
    for names in together:
        if not context.has_time(20 if context.dry else 150, f"{', '.join(names)} and more"):
            return
        with engines(context, {name: sides[name] for name in names}, warm_up) as running:
            run(running)

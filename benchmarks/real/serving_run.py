"""One measured run over HTTP: a server, the load, and the counters of both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness.display import working
from benchmarks.harness.load import Load
from benchmarks.harness.shape import KvShape, PieSizes
from benchmarks.real.block_samples import BlockSample, sampled_blocks
from benchmarks.real.chats import LoadTimes, drive
from benchmarks.real.counters import last_pie_line
from benchmarks.real.server import ServerError, VllmServer

SERVED_NAME = "model"
WARM_UP_TOKENS = 12
TOKENS_MIN = 100
"""Fewest tokens of a chat: with fewer the chats would fit the device, and nothing be compared."""

GAUGES = (
    "resident_blocks",
    "pooled_blocks",
    "ring_bytes",
    "link_bytes_per_second",
    "admission_limit_blocks",
)
"""Pie's gauges that a run reports, as they stand at the end of the load."""

COUNTERS = (
    "loaded_bytes",
    "stored_bytes",
    "load_seconds",
    "stall_seconds",
    "recomputed_tokens",
)
"""Pie's counters of which a run reports the growth during the load."""


@dataclass(frozen=True)
class Setting:
    """What all runs of one comparison share.

    Attributes:
        model: folder of the model.
        shape: KV sizes of the model at `block_size`.
        block_size: tokens of one block.
        dtype: number format that the model runs in.
        max_model_len: longest context served, in tokens.
        compiled: whether torch.compile is on; eager starts faster.
        logs: folder of the servers' logs.
    """

    model: Path
    shape: KvShape
    block_size: int
    dtype: str
    max_model_len: int
    compiled: bool
    logs: Path


@dataclass(frozen=True)
class ServedRun:
    """What one run showed.

    Attributes:
        figures: throughput, latencies in ms, preemptions; pie's own begin with `pie_`.
        times: when the pieces of each answer came.
        blocks: blocks in use over the time of the load; empty where they were not sampled.
    """

    figures: dict[str, float]
    times: LoadTimes
    blocks: tuple[BlockSample, ...] = ()


def server_arguments(setting: Setting, device_blocks: int, pie: PieSizes | None) -> list[str]:
    """The options of `vllm serve`; `pie` None is stock vLLM."""
    arguments = [
        f"--served-model-name={SERVED_NAME}",
        f"--block-size={setting.block_size}",
        f"--max-model-len={setting.max_model_len}",
        f"--kv-cache-memory-bytes={device_blocks * setting.shape.block_bytes}",
        f"--dtype={setting.dtype}",
    ]
    if not setting.compiled:
        arguments.append("--enforce-eager")
    if pie is not None:
        arguments += ["--block-manager=pie", *pie.server_options(setting.shape)]
    return arguments


def warm_up(url: str, load: Load, seconds_max: float | None) -> Load:
    """Stream a few tokens of every chat, and return the load that fits the time allowed."""
    times = drive(url, SERVED_NAME, replace(load, tokens=WARM_UP_TOKENS)).summary()
    if seconds_max is None:
        return load
    fitting = int(seconds_max / (times["itl_p50_ms"] / 1e3))
    return replace(load, tokens=min(load.tokens, max(TOKENS_MIN, fitting)))


def run_server(
    name: str,
    setting: Setting,
    load: Load,
    device_blocks: int,
    pie: PieSizes | None,
    seconds_max: float | None = None,
    sampled: bool = False,
) -> ServedRun:
    """Start a server, stream `load` from it, stop it.

    Args:
        name: name of the run and of its log.
        setting: what all runs share.
        load: the chats.
        device_blocks: KV on the device, in blocks.
        pie: sizes of a pie run; None is stock vLLM.
        seconds_max: upper bound on the time of the load. A machine that is too slow for it, by
            what the warm-up shows, gives the chats fewer tokens.
        sampled: whether blocks in use are sampled during the load.

    Raises:
        ServerError: the server did not start, died, or did not end cleanly.
    """
    arguments = server_arguments(setting, device_blocks, pie)
    log = setting.logs / f"{name}.log"
    with VllmServer(setting.model, arguments, log) as server:
        with working(f"{name}: starting the server") as task:
            server.start(lambda seconds: task.note(f"{seconds:.0f} s"))
        with working(f"{name}: warming up"):
            load = warm_up(server.url, load, seconds_max)
        before = server.metrics()
        label = f"{name}: {load.chats} chats x {load.tokens} tokens"
        blocks: list[BlockSample] = []
        with working(label, load.total_tokens) as task:
            if sampled:
                with sampled_blocks(server.metrics, device_blocks) as blocks:
                    times = drive(server.url, SERVED_NAME, load, task.advance)
            else:
                times = drive(server.url, SERVED_NAME, load, task.advance)
        after = server.metrics()
    if server.exit_status != 0:
        raise ServerError(f"the server ended with status {server.exit_status}; see {log}")
    figures = times.summary() | {"tokens_per_chat": load.tokens}
    preempted = "vllm:num_preemptions_total"
    figures["preemptions"] = after.get(preempted, 0.0) - before.get(preempted, 0.0)
    if pie is not None:
        figures |= pie_figures(before, after, log)
    return ServedRun(figures, times, tuple(blocks))


def pie_figures(before: dict[str, float], after: dict[str, float], log: Path) -> dict[str, float]:
    """Pie's gauges at the end of a load, its counters over the load, and its peak of pooled blocks.

    Raises:
        ServerError: the log has no line of pie's totals.
    """
    line = last_pie_line(log)
    if not line:
        raise ServerError(f"the server printed no `Pie: steps=…` line; see {log}")
    found = {"pie_pooled_peak": line["pooled_peak"]}
    for key in GAUGES:
        found[f"pie_{key}"] = after.get(f"vllm:pie_{key}", 0.0)
    for key in COUNTERS:
        name = f"vllm:pie_{key}_total"
        found[f"pie_{key}"] = after.get(name, 0.0) - before.get(name, 0.0)
    waits = "vllm:pie_head_waits_total:"
    for name in after:
        if name.startswith(waits):
            reason = name.removeprefix(waits)
            found[f"pie_head_waits:{reason}"] = after[name] - before.get(name, 0.0)
    return found

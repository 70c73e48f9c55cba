"""One measured run over HTTP: a server, the load, and the counters of both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness.display import working
from benchmarks.harness.load import Load
from benchmarks.harness.shape import KvShape, PieSizes
from benchmarks.real.chats import drive
from benchmarks.real.counters import last_pie_line
from benchmarks.real.server import ServerError, VllmServer

SERVED_NAME = "model"
WARM_UP_TOKENS = 12
LEAST_TOKENS = 100
"""Fewer tokens a chat would not fill the device, and nothing would be compared."""


@dataclass(frozen=True)
class Setting:
    """What all runs of one comparison share.

    Attributes:
        model: folder of the model.
        shape: its KV sizes at `block_size`.
        block_size: tokens of one block.
        dtype: that the model runs in.
        max_model_len: longest context served.
        compiled: torch.compile on; off (eager) starts faster.
        logs: folder of the servers' logs.
    """

    model: Path
    shape: KvShape
    block_size: int
    dtype: str
    max_model_len: int
    compiled: bool
    logs: Path


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
        arguments += [
            "--block-manager=pie",
            f"--pie-pool-gib={pie.pool_gib(setting.shape)}",
            f"--pie-ring-slots={pie.ring_slots}",
        ]
        if pie.ring_fraction is not None:
            arguments.append(f"--pie-ring-fraction={pie.ring_fraction}")
    return arguments


def warm_up(url: str, load: Load, allowance: float | None) -> Load:
    """Stream a few tokens of every chat, and return the load that fits the time allowed."""
    times = drive(url, SERVED_NAME, replace(load, tokens=WARM_UP_TOKENS)).summary()
    if allowance is None:
        return load
    fitting = int(allowance / (times["itl_p50_ms"] / 1e3))
    return replace(load, tokens=min(load.tokens, max(LEAST_TOKENS, fitting)))


def run_server(
    name: str,
    setting: Setting,
    load: Load,
    device_blocks: int,
    pie: PieSizes | None,
    allowance: float | None = None,
) -> dict[str, float]:
    """Start a server, stream `load` from it, stop it; return all figures of the run.

    Args:
        name: of the run and its log.
        setting: what all runs share.
        load: the chats.
        device_blocks: KV on the device, in blocks.
        pie: sizes of a pie run; None is stock vLLM.
        allowance: seconds that the load should take; on a machine too slow for that, as the
            warm-up shows, the chats get fewer tokens.

    Raises:
        ServerError: the server did not start, died, or did not end cleanly.
    """
    arguments = server_arguments(setting, device_blocks, pie)
    log = setting.logs / f"{name}.log"
    with VllmServer(setting.model, arguments, log) as server:
        with working(f"{name}: starting the server") as task:
            server.start(lambda seconds: task.note(f"{seconds:.0f} s"))
        with working(f"{name}: warming up"):
            load = warm_up(server.url, load, allowance)
        before = server.metrics()
        label = f"{name}: {load.chats} chats x {load.tokens} tokens"
        with working(label, load.total_tokens) as task:
            times = drive(server.url, SERVED_NAME, load, task.advance)
        after = server.metrics()
    if server.exit_status != 0:
        raise ServerError(f"the server ended with status {server.exit_status}; see {log}")
    preempted = "vllm:num_preemptions_total"
    figures = times.summary() | {"tokens_per_chat": load.tokens}
    figures["preemptions"] = after.get(preempted, 0.0) - before.get(preempted, 0.0)
    if pie is not None:
        counters = last_pie_line(log)
        if not counters:
            raise ServerError(f"the server printed no `Pie: steps=…` line; see {log}")
        figures.update({f"pie_{key}": value for key, value in counters.items()})
    return figures

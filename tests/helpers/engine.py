"""Real vLLM engines in a process of their own, with results shared between tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.model import REPOSITORY

KV_HEADS, HEAD = 3, 64
ELEMENT = {"bfloat16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CACHE_ROOT": str(REPOSITORY / "build" / "vllm-cache"),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # vLLM's n-grams run in numba, whose threads make torch use as many: each operation of a step
    # then waits for a core that other work has.
    "NUMBA_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class EngineError(Exception):
    """What the engine raised, as ``Type: text``."""


@dataclass(frozen=True)
class Setup:
    """An engine's settings. ``resident`` blocks and ``pooled`` ones, or the same all on the device.

    Attributes:
        model: folder.
        layers: layers of that model.
        resident: resident blocks (null block included); stock has as many as both.
        pooled: pooled blocks.
        slots: ring slots.
        block_size: tokens of a block.
        dtype: of weights and KV.
        debug: words that break the transfer engine on purpose.
        ring: width of the ring; None is as wide as all pooled blocks.
        emulated_link_gbps: emulated link speed.
        limit_contention: whether what copies take from the compute counts as slowdown.
        rows: of the CPU pool; None is one for each pooled block.
        parking: policy of eviction of parked KV, or "off"; None is the default.
        target: of the slowdown; "off" keeps the schedule that stock has.
        idle_seconds: how long the pool keeps memory that is not needed.
        full_graphs: steps that load may run in FULL graphs.
        lost_relabels: the worker drops all relabels.
        fused_write: the layer whose KV write passes no gate, as a fused kernel's; None is none.
        lost_orders: plans do not say which copies the compute comes after or before as a whole.
        hasty_blocks: blocks count as complete with the draft tokens of the step that verifies them.
        blind_keys: keys of cached KV know of tokens alone, not of adapters and images.
        lost_beside: what preempted requests had in groups without a pool does not come back.
        kv_heads: of the model, on each rank.
        page_bytes: of a block in one layer; None is that of SmolLM2 and models of its heads.
        ranks: of tensor parallelism; all sizes are those of one.
        drafts: those of the layers that a drafter has, whose pages are all on the device.
        other: further arguments of ``vllm.LLM``.
    """

    model: Path
    layers: int
    resident: int
    pooled: int
    slots: int = 3
    block_size: int = 32
    dtype: str = "bfloat16"
    debug: tuple[str, ...] = ()
    ring: float | str | None = None
    emulated_link_gbps: float | None = None
    limit_contention: bool | None = None
    rows: int | None = None
    parking: str | None = None
    target: float | str = "off"
    idle_seconds: float = 60.0
    full_graphs: bool = False
    lost_relabels: bool = False
    fused_write: int | None = None
    lost_orders: bool = False
    hasty_blocks: bool = False
    blind_keys: bool = False
    lost_beside: bool = False
    kv_heads: int = KV_HEADS
    page_bytes: int | None = None
    ranks: int = 1
    drafts: int = 0
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def page(self) -> int:
        """Bytes of a block in one layer."""
        if self.page_bytes is not None:
            return self.page_bytes
        element = ELEMENT[self.other.get("kv_cache_dtype", self.dtype)]
        return self.block_size * 2 * self.kv_heads * HEAD * element

    @property
    def device_bytes(self) -> int:
        """Bytes of the resident blocks, the ring, and a drafter's pages of pooled blocks."""
        return self.page * (self.layers * self.resident + self.pooled_pages * self.pooled)

    @property
    def pooled_pages(self) -> int:
        """Device pages of a pooled block."""
        return self.slots + self.drafts

    def engine(self, kind: str) -> dict[str, Any]:
        """Settings for the worker: ``pie``; ``stock``, with all blocks on the
        device; or ``starved``, stock with the bytes that pie has on the device.
        """
        blocks = self.resident + self.pooled
        everything = self.layers * blocks * self.page
        llm: dict[str, Any] = {
            "model": str(self.model),
            "dtype": self.dtype,
            "block_size": self.block_size,
            "max_model_len": 1024,
            "max_num_batched_tokens": 128,
            "max_num_seqs": 64,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": everything if kind == "stock" else self.device_bytes,
            **self.other,
        }
        if self.ranks > 1:
            llm |= {"tensor_parallel_size": self.ranks, "distributed_executor_backend": "mp"}
        if kind != "pie":
            return {"llm": llm, "pie": None, "lost_relabels": False}
        ring = self.pooled_pages * self.pooled * self.page
        rows = self.pooled if self.rows is None else self.rows
        pie: dict[str, Any] = {
            # A little more than the rows take: GiB are rounded down to whole rows.
            "pool_gib": self.ranks * (rows + 0.5) * self.layers * self.page / 2**30,
            "ring_slots": self.slots,
            "ring_fraction": self.ring or (ring + self.page) / self.device_bytes,
            "target_slowdown": self.target,
            "pool_idle_seconds": self.idle_seconds,
        }
        if self.debug:
            pie["debug"] = list(self.debug)
        if self.full_graphs:
            pie["full_graphs"] = True
        for key in ("emulated_link_gbps", "limit_contention", "parking"):
            if getattr(self, key) is not None:
                pie[key] = getattr(self, key)
        broken: dict[str, Any] = {
            "lost_relabels": self.lost_relabels,
            "fused_write": self.fused_write,
        }
        for key in ("lost_orders", "hasty_blocks", "blind_keys", "lost_beside"):
            if getattr(self, key):
                broken[key] = True
        return {"llm": llm, "pie": pie, **broken}


def request(
    prompt: str | list[int],
    *,
    priority: int = 0,
    abort_at: int | None = None,
    beside: dict[str, Any] | None = None,
    **params: Any,
) -> dict[str, Any]:
    """A greedy request unless ``params`` say otherwise; aborted after step ``abort_at``.

    ``beside`` is an adapter or an image, see tests/helpers/engine_inputs.py.
    """
    return {
        "prompt": prompt,
        "priority": priority,
        "abort_at": abort_at,
        "params": {"temperature": 0.0, "ignore_eos": True, **params},
        **(beside or {}),
    }


def round_(
    requests: list[dict[str, Any]],
    reset_prefix_cache: bool = False,
    idle: float = 0.0,
    late: float = 0.0,
    failing: list[tuple[str, int, str, int]] | None = None,
) -> dict[str, Any]:
    """Requests that are all added before the first step, after some idle seconds.

    Pie's worker gets to that step ``late`` seconds after it was planned. ``failing`` are copies
    that fail, see ``FailingCopies``.
    """
    more: dict[str, Any] = {"late": late} if late else {}
    if failing:
        more["failing"] = failing
    return {"requests": requests, "reset_prefix_cache": reset_prefix_cache, "idle": idle, **more}


class _Lane:
    """One worker process and the jobs sent to it, answered in order."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._waiting: list[str] = []
        self._results: dict[str, dict[str, Any]] = {}

    def submit(self, line: str) -> None:
        """Send a job, unless it was sent before."""
        if line in self._results or line in self._waiting:
            return
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self._waiting.append(line)

    def result(self, line: str) -> dict[str, Any]:
        """Wait for the answer of a job that was sent."""
        while line not in self._results:
            assert self._process is not None
            assert self._process.stdout is not None
            answer = self._process.stdout.readline()
            if not answer:
                self.close()
                raise RuntimeError(f"an engine's process died; its output is in {self.log}")
            self._results[self._waiting.pop(0)] = json.loads(answer)
        return self._results[line]

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.engine_worker"],
                cwd=REPOSITORY,
                env={**os.environ, **ENVIRONMENT, **self._environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        self._waiting.clear()
        if process is None:
            return
        assert process.stdin is not None
        try:
            process.stdin.close()
            process.wait(60)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()


class Engines:
    """Runs jobs on two worker processes, one for pie and one for stock, side by side.

    Equal jobs are run once. Jobs with the same settings that follow each other
    run on one engine. Call ``close`` at the end.
    """

    def __init__(self, logs: Path, environment: dict[str, str] | None = None) -> None:
        """Write what the processes print to a folder; add variables to their environment."""
        more = environment or {}
        self._lanes = {kind: _Lane(logs / f"{kind}.log", more) for kind in ("pie", "stock")}

    def run(
        self, setup: Setup, rounds: list[dict[str, Any]], kind: str = "pie"
    ) -> list[dict[str, Any]]:
        """The record of each round. Raises EngineError with what the engine raised."""
        lane, line = self._submit(setup, rounds, kind)
        result = lane.result(line)
        if "error" in result:
            raise EngineError(result["error"])
        records: list[dict[str, Any]] = result["rounds"]
        return records

    def both(
        self,
        setup: Setup,
        rounds: list[dict[str, Any]],
        stock: Setup | None = None,
        stock_rounds: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Records of pie and of stock with memory for all blocks, run side by side."""
        job = (stock or setup, stock_rounds or rounds, "stock")
        self._submit(*job)
        self._submit(setup, rounds, "pie")
        return self.run(setup, rounds), self.run(*job)

    def log(self, kind: str) -> str:
        """What the process for pie, or for stock, has printed."""
        return self._lanes[kind].log.read_text(errors="replace")

    def _submit(self, setup: Setup, rounds: list[dict[str, Any]], kind: str) -> tuple[_Lane, str]:
        lane = self._lanes["pie" if kind == "pie" else "stock"]
        line = json.dumps({"engine": setup.engine(kind), "rounds": rounds})
        lane.submit(line)
        return lane, line

    def close(self) -> None:
        """End both processes."""
        for lane in self._lanes.values():
            lane.close()

"""What does a step cost the thread that launches the model, whatever its plan?

The engine and its CUDA driver over a libcuda that does nothing but take the published time of a
copy's descriptor (0.5 us for cuMemcpyBatchAsync on an H100, vLLM PR 48434). The gates are called as
the model's hooks call them, by ctypes; the time is this thread's processor time.

    python -m benchmarks.submission [--pieces 1142] [--layers 80] [--descriptor-ns 500]
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.builds import CSRC, ROOT, build_once, build_script, compile_cpp
from benchmarks.harness.display import console
from benchmarks.harness.machine import facts
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result
from benchmarks.harness.stats import percentile
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS, Copy, StepPlan, runs

SOURCE = Path(__file__).resolve().parent / "harness" / "idle_cuda.cpp"
HOST_KERNEL = ROOT / "tests" / "csrc"
"""Where the host build of the gather kernel is."""

BUILDS = ROOT / "build" / "idle-cuda"
COMPUTE = 0x5555
"""A stream's handle; nothing looks at it."""

WAYS = ("copy engines", "one table")
TABLE_FROM = 1 << 30
"""Bytes of a run below which the kernel copies it: all of them."""


def library_folder() -> Path:
    """The folder with ``libcuda.so.1``, built when it is not there.

    Raises:
        RuntimeError: there is no compiler or no cuda.h.
    """
    files = [SOURCE, CSRC / "kernels" / "gather.cu", HOST_KERNEL / "gather_host.h"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    target = BUILDS / digest / "libcuda.so.1"
    build_once(target, lambda: _compile(target))
    return target.parent


def _compile(target: Path) -> None:
    headers = build_script().cuda_headers()
    if headers is None:
        raise RuntimeError("the idle libcuda needs cuda.h of CUDA 12.8 or newer")
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    places = ["-isystem", str(headers), f"-iquote{CSRC}", f"-iquote{HOST_KERNEL}"]
    compile_cpp(target, SOURCE, *flags, *places)


def plan_of(step: int, pieces: int, first: int) -> StepPlan:
    """Single pages whose rows do not lie together, others in each step."""
    loads = runs(Copy(first + i, (7 * i + step) % pieces, 1) for i in range(pieces))
    return StepPlan(step, NO_RUNS, NO_RUNS, loads, (), forward=True)


def one_step(engine: TransferEngine, plan: StepPlan) -> float:
    """Seconds of this thread."""
    layers = range(engine.geometry.num_layers)
    start = time.thread_time()
    engine.begin_step(plan, COMPUTE)
    for layer in layers:
        engine.before_write(layer)
        engine.before_attention(layer)
        engine.after_attention(layer)
    engine.end_step()
    return time.thread_time() - start


def measure(pieces: int, layers: int, steps: int) -> dict[str, Any]:
    """In a child that finds the idle libcuda: milliseconds and counts a step, each way."""
    idle = ctypes.CDLL("libcuda.so.1")
    counts = (ctypes.c_longlong * 3)()
    sizes = Geometry(layers, 4096, 8, pieces, 3, pieces, pieces, 2 << 20)
    found = {}
    with TransferEngine(sizes, driver="cuda", chunks=1) as engine:
        step = 0
        for way in WAYS:
            engine.use_gather(b"any", TABLE_FROM if way == "one table" else 0)
            seconds = []
            for _ in range(steps + 1):
                step += 1
                idle.idle_cuda_counts(counts)
                before = list(counts)
                seconds.append(one_step(engine, plan_of(step, pieces, 8)))
                idle.idle_cuda_counts(counts)
            copies, launches, calls = (a - b for a, b in zip(counts, before, strict=True))
            found[way] = {
                "ms": 1e3 * percentile(seconds[1:], 50),
                "copies": copies,
                "launches": launches,
                "calls": calls,
            }
    return found


def run(pieces: int, layers: int, steps: int, descriptor_ns: int) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(library_folder()),
        "IDLE_CUDA_DESCRIPTOR_NS": str(descriptor_ns),
    }
    command = [sys.executable, "-m", "benchmarks.submission", "--child"]
    sizes = ["--pieces", str(pieces), "--layers", str(layers), "--steps", str(steps)]
    done = subprocess.run(
        [*command, *sizes], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Both ways, printed and written."""
    parser = plain_parser("submission", __doc__)
    parser.add_argument("--pieces", type=int, default=1142)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--steps", type=int, default=9, help="whose median counts")
    parser.add_argument("--descriptor-ns", type=int, default=500)
    parser.add_argument("--output", type=Path, default=RESULTS / "submission")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.pieces, args.layers, args.steps)))
        return
    found = run(args.pieces, args.layers, args.steps, args.descriptor_ns)
    for way, figures in found.items():
        console.print(
            f"{args.pieces} pieces x {args.layers} layers by {way}: {figures['ms']:.2f} ms a step, "
            f"{figures['copies']} copies, {figures['launches']} launches, {figures['calls']} calls"
        )
    machine = {"machine": facts(), "descriptor_ns": args.descriptor_ns}
    write_result(args.output, machine | {"pieces": args.pieces, "layers": args.layers} | found)


if __name__ == "__main__":
    main()

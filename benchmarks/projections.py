"""What might pie bring on three GPUs? A projection of the simulator, not a measurement.

Nothing here ran on a GPU. Llama-3.1-8B in bf16 (32 layers, 8 KV heads of 128: 128 KiB of KV a
token) serves chats that need more KV than the device holds. Each machine is played with pie, as
stock vLLM with the same device bytes (ring included), and as stock vLLM with memory for all.

Peak speeds "by specification" are the makers' published figures, quoted and not checked here.

    python -m benchmarks.projections
"""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.display import console, table, working
from benchmarks.harness.machine import facts
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result
from benchmarks.simulated.gpu_machines import BLOCK_TOKENS, MACHINES, ROW_BYTES, Machine
from pie_vllm.geometry import Geometry
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.simulator import Simulation, run_stock
from pie_vllm.simulation.traces import Job


def chats(geometry: Geometry, excess: float) -> list[Job]:
    """Chats that come at once and whose KV at half of their answers is ``excess`` times R + W.

    Prompts of 500 to 2,000 tokens, answers of 200 to 800.
    """
    rng = random.Random(1)
    jobs: list[Job] = []
    blocks = 0.0
    while blocks < excess * geometry.device_bytes / ROW_BYTES:
        job = Job(0.0, rng.randint(500, 2000), rng.randint(200, 800))
        blocks += (job.prompt + job.answer / 2) / BLOCK_TOKENS
        jobs.append(job)
    return jobs


def play(machine: Machine, excess: float) -> dict[str, Any]:
    """One machine."""
    geometry = machine.geometry()
    jobs = chats(geometry, excess)
    all_blocks = sum((job.prompt + job.answer) // BLOCK_TOKENS + 2 for job in jobs)
    decider = Decider(geometry.row_bytes, geometry.pooled_blocks, prior=machine.prior())
    pie = Simulation(geometry, machine.profile(), jobs, decider).run()
    equal = run_stock(machine.kv_bytes // ROW_BYTES, machine.profile(), jobs)
    plenty = run_stock(all_blocks, machine.profile(), jobs)
    return {
        "machine": machine.name,
        "source": machine.source,
        "profile": asdict(machine.profile()),
        "resident_blocks": geometry.resident_blocks,
        "pooled_blocks": geometry.pooled_blocks,
        "chats": len(jobs),
        "tok_s": pie.throughput,
        "stock_equal_tok_s": equal.throughput,
        "stock_all_tok_s": plenty.throughput,
        "to_stock_equal": pie.throughput / equal.throughput,
        "to_stock_all": pie.throughput / plenty.throughput,
        "stall_share": pie.stall_seconds / (pie.seconds - pie.stall_seconds),
        "pooled_read_peak": max(pie.loads),
        "preemptions": pie.preemptions,
        "stock_preemptions": equal.preemptions,
    }


def main() -> None:
    """The command line."""
    parser = plain_parser("projections", __doc__)
    parser.add_argument("--excess", type=float, default=2.0, help="KV wanted / KV of the device")
    parser.add_argument("--output", type=Path, default=RESULTS / "projections")
    args = parser.parse_args()
    with working(f"{len(MACHINES)} machines") as task:
        found = []
        for machine in MACHINES:
            found.append(play(machine, args.excess))
            task.note(machine.name)
    columns = (
        ("to_stock_equal", "pie / stock, equal bytes", 2),
        ("to_stock_all", "pie / stock, memory for all", 2),
        ("stall_share", "stall, share", 4),
        ("preemptions", "preemptions", 0),
        ("stock_preemptions", "preemptions of stock", 0),
        ("pooled_blocks", "pooled blocks", 0),
        ("resident_blocks", "resident blocks", 0),
        ("chats", "chats", 0),
        ("tok_s", "tokens/s of pie", 0),
    )
    rows = [[label, *(f"{one[key]:.{digits}f}" for one in found)] for key, label, digits in columns]
    table(
        "Projections of a model of time; nothing was measured",
        ["", *(machine.name for machine in MACHINES)],
        rows,
    )
    for machine in MACHINES:
        console.print(f"{machine.name}: {machine.source}")
    write_result(args.output, {"machine": facts(), "note": "projections", "machines": found})


if __name__ == "__main__":
    main()

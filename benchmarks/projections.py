"""What might pie bring on three GPUs? A projection of the simulator, not a measurement.

Nothing here ran on a GPU. Llama-3.1-8B in bf16 (32 layers, 8 KV heads of 128: 128 KiB of KV a
token) serves chats that need more KV than the device holds. Each machine is played with pie, as
stock vLLM with the same device bytes (ring included), and as stock vLLM with memory for all.

Peak speeds "by specification" are the makers' published figures, quoted and not checked here.

    python -m benchmarks.projections
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.display import console, table, working
from benchmarks.harness.machine import RESULTS, facts, write_json
from benchmarks.harness.options import plain_parser
from pie_vllm.geometry import Geometry, blocks_fed, plan_geometry
from pie_vllm.plan import Prior
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.simulator import Simulation, run_stock
from pie_vllm.simulation.traces import Job, Profile

LAYERS, BLOCK_TOKENS = 32, 16
PAGE_BYTES = 2 * 8 * 128 * 2 * BLOCK_TOKENS
"""K and V, 8 heads of 128, 2 bytes: the model's configuration; 64 KiB."""
ROW_BYTES = LAYERS * PAGE_BYTES
WEIGHT_BYTES = 16.1e9
"""8.03e9 parameters of 2 bytes: arithmetic."""
FLOPS_PER_TOKEN = 2 * 8.03e9
"""Two for each parameter; attention left out: arithmetic."""
GEMM_SHARE = 0.5
"""Of the peak that a prefill reaches: an assumption."""
HOST_SECONDS = 2e-3
"""Of a step, that the GPU waits for the scheduler and launches: an assumption."""
REQUEST_SECONDS = 1e-5
"""Of a step, for each request (sampling, bookkeeping): an assumption."""
MAX_NUM_SEQS = 256
GRANULARITY = 2 << 20
"""Bytes that CUDA maps in one piece."""


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        name: of it.
        link: bytes a second to the device.
        memory: bytes a second of device memory.
        flops: a second, bf16 with fp32 sums, dense: the peak by specification.
        kv_bytes: of the device for KV, ring included.
        source: of the constants; which are measured, and by whom.
    """

    name: str
    link: float
    memory: float
    flops: float
    kv_bytes: int
    source: str

    def profile(self) -> Profile:
        """A step reads all weights and the KV of its requests once, at the memory's speed."""
        return Profile(
            link=self.link,
            base=WEIGHT_BYTES / self.memory + HOST_SECONDS,
            per_request=REQUEST_SECONDS,
            per_prompt_token=FLOPS_PER_TOKEN / (GEMM_SHARE * self.flops),
            per_block=ROW_BYTES / self.memory,
            exposed=1 / LAYERS,
        )

    def prior(self) -> Prior:
        """What a server measures at start."""
        profile = self.profile()
        step = profile.base + MAX_NUM_SEQS * profile.per_request
        return Prior(self.link, step_seconds=step)

    def geometry(self) -> Geometry:
        """As a server plans it, with a pool of four times the device's KV bytes."""
        step = self.prior().step_seconds or 0.0
        return plan_geometry(
            num_layers=LAYERS,
            page_bytes=PAGE_BYTES,
            device_bytes=self.kv_bytes,
            pool_bytes=4 * self.kv_bytes,
            granularity=GRANULARITY,
            needed_blocks=512,
            fed_blocks=blocks_fed(self.link, step, ROW_BYTES),
        )


MACHINES = (
    Machine(
        "GH200 96 GB",
        link=377e9,
        memory=3.7e12,
        flops=989e12,
        kv_bytes=8 << 30,
        source="link 377 GB/s host to device and HBM3 triad 3,728 GB/s: measured by dnhkng "
        "(dnhkng.github.io, 2026-04-25), nvbandwidth and STREAM; flops: NVIDIA's specification; "
        "8 GiB of KV: an assumption, a GPU shared with other uses, to keep the run short",
    ),
    Machine(
        "H200 PCIe Gen5",
        link=55e9,
        memory=4.0e12,
        flops=989e12,
        kv_bytes=8 << 30,
        source="link 55 GB/s: nvbandwidth on Azure ND H200 v5 (samuel-bohman/AI-benchmarking-"
        "guide); memory 4.0 TB/s of 4.8 by specification: an assumption; flops: NVIDIA's "
        "specification; 8 GiB of KV: an assumption, as above",
    ),
    Machine(
        "24 GB card, PCIe Gen4",
        link=25e9,
        memory=0.9e12,
        flops=165e12,
        kv_bytes=4 << 30,
        source="all arithmetic from specifications of an RTX 4090, nothing measured: Gen4 x16 "
        "31.5 GB/s, 80 % of it; GDDR6X 1,008 GB/s, 90 % of it; 165 Tflops; 24 GB less 16 GB of "
        "weights and 3 GB of activations leave 4 GiB",
    ),
)


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
    parser.add_argument("--output", type=Path, default=RESULTS / "projections.json")
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
    write_json(args.output, {"facts": facts(), "note": "projections", "machines": found})


if __name__ == "__main__":
    main()

"""Machines with GPUs, as the simulator knows them; no figure of them was measured here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior
from pie_vllm.simulation.traces import Profile
from pie_vllm.sizing import blocks_fed, plan_geometry

BLOCK_TOKENS = 16
PAGE_BYTES = 2 * 8 * 128 * 2 * BLOCK_TOKENS
"""K and V, 8 heads of 128, 2 bytes: the configuration of Llama 3.1 8B and 70B; 64 KiB."""
GEMM_SHARE = 0.5
"""Share of the peak that a prefill reaches: an assumption."""
HOST_SECONDS = 2e-3
"""Time of a step in which the GPU waits for the scheduler and launches: an assumption."""
REQUEST_SECONDS = 1e-5
"""Time of a step for each request (sampling, bookkeeping): an assumption."""
MAX_NUM_SEQS = 256
GRANULARITY = 2 << 20
"""Bytes that CUDA maps in one piece."""


@dataclass(frozen=True)
class Model:
    """A model with pages of ``PAGE_BYTES``.

    Attributes:
        layers: number of attention layers.
        weight_bytes: bytes of the weights, all of which a step reads.
        flops_per_token: operations for a prompt token, two for each parameter; attention left out.
    """

    layers: int
    weight_bytes: float
    flops_per_token: float

    @property
    def row_bytes(self) -> int:
        """Bytes of a block in all layers."""
        return self.layers * PAGE_BYTES


LLAMA_8B = Model(32, weight_bytes=16.1e9, flops_per_token=2 * 8.03e9)
"""8.03e9 parameters of 2 bytes: arithmetic."""
LAYERS, ROW_BYTES = LLAMA_8B.layers, LLAMA_8B.row_bytes


@dataclass(frozen=True)
class Machine:
    """A GPU that serves a model.

    Attributes:
        name: name of the GPU and of its link.
        link: speed of the link to the device, bytes per second.
        memory: speed of device memory, bytes per second.
        flops: peak by specification, operations per second, bf16 with fp32 sums, dense.
        kv_bytes: device memory for KV, ring included.
        source: where the constants are from: which are measured, and by whom.
        model: the model.
        store_link: speed of the link from the device, bytes per second; None is ``link``, shared.
        pool_bytes: CPU memory for KV; None is four times ``kv_bytes``.
    """

    name: str
    link: float
    memory: float
    flops: float
    kv_bytes: int
    source: str
    model: Model = LLAMA_8B
    store_link: float | None = None
    pool_bytes: int | None = None

    def profile(self) -> Profile:
        """A step reads all weights and the KV of its requests once, at the memory's speed."""
        return Profile(
            link=self.link,
            base=self.model.weight_bytes / self.memory + HOST_SECONDS,
            per_request=REQUEST_SECONDS,
            per_prompt_token=self.model.flops_per_token / (GEMM_SHARE * self.flops),
            per_block=self.model.row_bytes / self.memory,
            exposed=1 / self.model.layers,
            store_link=self.store_link,
        )

    def prior(self) -> Prior:
        """What a server measures at start."""
        profile = self.profile()
        step = profile.base + MAX_NUM_SEQS * profile.per_request
        attention = self.kv_bytes / self.memory
        return Prior(self.link, step_seconds=step, attention_seconds=attention)

    def geometry(self, longest: int = 512) -> Geometry:
        """The geometry that a server plans.

        Args:
            longest: number of blocks of the longest request.
        """
        step = self.prior().full_step_seconds or 0.0
        return plan_geometry(
            num_layers=self.model.layers,
            page_bytes=PAGE_BYTES,
            device_bytes=self.kv_bytes,
            pool_bytes=4 * self.kv_bytes if self.pool_bytes is None else self.pool_bytes,
            granularity=GRANULARITY,
            needed_blocks=longest,
            fed_blocks=blocks_fed(self.link, step, self.model.row_bytes),
            link_bytes_per_s=self.link,
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

H200 = replace(MACHINES[1], kv_bytes=110 * 10**9)
"""An H200 that serves this model alone: 90 % of 141 GB, less weights and activations."""

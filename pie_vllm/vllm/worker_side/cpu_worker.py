"""The worker on vLLM's CPU platform."""

from __future__ import annotations

from mmap import PAGESIZE

from vllm.v1.worker.cpu_worker import CPUWorker

from pie_vllm.vllm.worker_side.worker import PieWorkerMixin


class PieCPUWorker(PieWorkerMixin, CPUWorker):
    """vLLM's CPU worker over the host driver."""

    pie_device = "cpu"
    pie_driver = "host"
    pie_granularity = PAGESIZE  # 4 KiB on x86-64, often 64 KiB on Arm: what the host driver maps
    pie_device_is_host = True

"""The worker on CUDA, over vLLM's V1 and V2 model runners."""

from __future__ import annotations

import torch
from vllm.v1.worker.gpu_worker import Worker

from pie_vllm.engine.native import driver_granularity
from pie_vllm.vllm.worker_side.failures import said_once
from pie_vllm.vllm.worker_side.output_tags import DeviceTimer, Timer
from pie_vllm.vllm.worker_side.worker import PieWorkerMixin


class PieGPUWorker(PieWorkerMixin, Worker):
    """vLLM's GPU worker over the CUDA driver."""

    pie_device = "cuda"
    pie_driver = "cuda"
    pie_device_is_host = False
    pie_pool_has_tables = True

    @said_once
    def init_device(self) -> None:
        """Take the device as vLLM does, then ask the driver what it maps in one piece.

        Raises:
            UnsupportedError: this build has no CUDA driver, the system's is too old, or the GPU
                shares the CPU's memory, as integrated devices do.
        """
        super().init_device()
        self.pie_granularity = driver_granularity(self.pie_driver)

    def pie_stream(self) -> int:
        """The stream that the model runs on: the current one of this thread."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def pie_capturing(self) -> bool:
        """Whether that stream is being captured."""
        return bool(torch.cuda.is_current_stream_capturing())

    def pie_timer(self) -> Timer:
        """A timer by events on that stream."""
        return DeviceTimer()

    def shutdown(self) -> None:
        """Shut down once the device is done: no kernel may read an arena that is gone."""
        try:
            if self.pie is not None:
                torch.cuda.synchronize(self.device)
        finally:
            super().shutdown()

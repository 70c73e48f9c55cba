"""Device memory that is kept for page tables of the CPU pool, before KV is sized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pie_vllm.config import PieConfig
from pie_vllm.errors import ConfigError
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior
from pie_vllm.sizing import PAGE_TABLE_SHARE, page_table_bytes
from pie_vllm.vllm.worker_side import worker as module
from pie_vllm.vllm.worker_side.worker import PieWorkerMixin
from tests.helpers.kv_groups import one_group

pytestmark = pytest.mark.vllm
GIB = 1 << 30
DEVICE, PAGE, LAYERS = 4 * GIB, 1 << 20, 8


class Stock:
    """vLLM's worker, as far as memory is sized."""

    def determine_available_memory(self) -> int:
        return DEVICE

    def get_kv_cache_spec(self) -> dict[str, Any]:
        spec = SimpleNamespace(page_size_bytes=PAGE, block_size=16)
        return dict.fromkeys(map(str, range(LAYERS)), spec)


class OnHost(PieWorkerMixin, Stock):
    """Shares the CPU's memory: there is no device that would have tables."""

    pie_driver, pie_granularity, pie_device_is_host = "host", 2 << 20, False


class OnCuda(OnHost):
    """As ``PieGPUWorker``."""

    pie_driver, pie_pool_has_tables = "cuda", True


def sized(monkeypatch: pytest.MonkeyPatch, worker: Any, pool_gib: float) -> Geometry:
    """What a worker makes of its memory."""
    config = PieConfig(pool_gib=pool_gib)
    monkeypatch.setattr(module.settings, "of", lambda _: SimpleNamespace(config=config))
    monkeypatch.setattr(module.grouping, "groups_by_vllm", lambda *_: [])
    monkeypatch.setattr(module, "groups_of", lambda _, specs, *__: one_group(specs))
    monkeypatch.setattr(module.ranks, "least_bytes", lambda *sizes: sizes)
    monkeypatch.setattr(module.ranks, "slowest", lambda prior: prior)
    monkeypatch.setattr(module.ranks, "share_of_pool", lambda gib, *_: int(gib * GIB))
    monkeypatch.setattr(PieWorkerMixin, "_pie_measure", lambda *_: Prior())
    monkeypatch.setattr(PieWorkerMixin, "_pie_requests", lambda *_: 1)
    worker.model_runner = SimpleNamespace()
    worker.vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True),
        model_config=SimpleNamespace(
            max_model_len=256, original_max_model_len=None, supports_multimodal_inputs=False
        ),
        speculative_config=None,
    )
    worker.determine_available_memory()
    found: Geometry = worker.pie_geometry()
    return found


@pytest.mark.parametrize("pool_gib", [1.0, 256.0])
def test_page_tables_come_off_the_devices_kv_memory(
    monkeypatch: pytest.MonkeyPatch, pool_gib: float
) -> None:
    """One byte of 512; what is left is used as before. It is among the counters."""
    tables = page_table_bytes(int(pool_gib * GIB))
    assert tables == int(pool_gib * GIB) // PAGE_TABLE_SHARE
    on_cuda, on_host = OnCuda(), OnHost()
    found = sized(monkeypatch, on_cuda, pool_gib)
    assert found.device_bytes + tables <= DEVICE
    before = sized(monkeypatch, on_host, pool_gib)
    assert before.device_bytes <= DEVICE
    lost = before.device_bytes - found.device_bytes
    assert tables - LAYERS * PAGE <= lost <= tables + 4 * LAYERS * PAGE
    assert on_cuda.pie_counters()["pool_table_bytes"] == tables
    assert on_host.pie_counters()["pool_table_bytes"] == 0


def test_a_pool_whose_tables_leave_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its flag, with both sizes and the way out."""
    with pytest.raises(ConfigError, match=r"--pie-pool-gib 2048\.000 .* 4096\.0 MiB.*Lower"):
        sized(monkeypatch, OnCuda(), 2048.0)


def test_the_gpu_worker_keeps_memory_for_tables() -> None:
    from pie_vllm.vllm.worker_side.gpu_worker import PieGPUWorker

    assert PieGPUWorker.pie_pool_has_tables
    assert not PieWorkerMixin.pie_pool_has_tables

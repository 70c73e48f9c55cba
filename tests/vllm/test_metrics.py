"""Pie's metrics reach vLLM's own, with the numbers that the engine counted."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client import REGISTRY
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

import pie_vllm
from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.errors import TransferError
from pie_vllm.plan import PoolOrder, Totals
from pie_vllm.policy.admission.waits import REASONS
from pie_vllm.vllm.compat import loggers
from pie_vllm.vllm.scheduler_side.metrics import Control, Hits, Report
from pie_vllm.vllm.scheduler_side.prometheus import BY_REASON, COUNTERS, GAUGES
from pie_vllm.vllm.worker_side.worker import PieWorkerMixin
from tests.helpers import scheduling
from tests.helpers.engine import Engines, Setup, request, round_
from tests.helpers.engine_load import chats
from tests.helpers.engine_model import LAYERS

pytestmark = pytest.mark.vllm

WAITS = {"link": 3, "residents": 2}
CONTROL = Control(7, 5, 3_000_000_000, 11, 2, 0.75, 0.006, 17, Hits(4, 5, 6), WAITS, 3)


def config(model: Path, **more: Any) -> VllmConfig:
    return EngineArgs(
        model=str(model), enforce_eager=True, kv_cache_memory_bytes=1 << 28, **more
    ).create_engine_config()


def exported() -> dict[str, float]:
    """All samples of pie's metrics by name; those of several labels added up."""
    found: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.startswith("vllm:pie_") and not sample.name.endswith("_created"):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def head_waits(reason: str) -> tuple[str, dict[str, str]]:
    """Name and labels of the steps in which the head of the queue waited for a reason."""
    (name,) = {
        sample.labels["model_name"]
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:pie_head_waits_total"
    }
    return "vllm:pie_head_waits_total", {"model_name": name, "engine": "0", "reason": reason}


def over_the_wire(stats: SchedulerStats) -> SchedulerStats:
    """What the front end gets of the statistics that the engine sends."""
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert received is not None
    return received


def test_increments_add_up_and_gauges_follow(model: Path) -> None:
    """From the scheduler's report through vLLM's encoding to the Prometheus page."""
    geometry = scheduling.geometry(8, 12)
    scheduler = scheduling.make(geometry)
    report, residency = Report(geometry), scheduler.kv_cache_manager.residency
    managers = StatLoggerManager(config(model, **pie_vllm.engine_args(pool_gib=0.1)))
    for totals in (Totals(3, 1000, 300, 0.25, 0.1, 0.004), Totals(5, 1700, 300, 0.5, 0.1, 0.004)):
        stats = SchedulerStats()
        loggers.carry(stats).update(report.changes(totals, residency, CONTROL))
        received = over_the_wire(stats)
        managers.record(received, None)
        assert loggers.carry(received) == {}, "vLLM's log line would count them as fetches"
    again = report.changes(totals, residency, CONTROL)
    assert again == {}, "an idle engine sends nothing"
    found = exported()
    assert found["vllm:pie_streaming_steps_total"] == 5
    assert found["vllm:pie_loaded_bytes_total"] == 1700
    assert found["vllm:pie_stored_bytes_total"] == 300
    assert found["vllm:pie_load_seconds_total"] == pytest.approx(0.5)
    assert found["vllm:pie_stall_seconds_total"] == pytest.approx(0.004)
    assert found["vllm:pie_streaming_seconds_total"] == pytest.approx(0.75)
    assert found["vllm:pie_slowed_seconds_total"] == pytest.approx(0.006)
    assert found["vllm:pie_resident_blocks"] == 8
    assert found["vllm:pie_pooled_blocks"] == 12
    assert found["vllm:pie_capacity_gained_blocks"] == geometry.capacity_gained_blocks > 0
    assert found["vllm:pie_admission_limit_blocks"] == 7
    assert found["vllm:pie_step_budget_blocks"] == 5
    assert found["vllm:pie_link_bytes_per_second"] == 3e9
    assert found["vllm:pie_left_out_requests_total"] == 11
    assert found["vllm:pie_recomputed_tokens_total"] == 17
    assert found["vllm:pie_failed_copies_total"] == 3
    assert [found[f"vllm:pie_{tier}_hits_total"] for tier in Hits._fields] == [4, 5, 6]
    waits = {reason: REGISTRY.get_sample_value(*head_waits(reason)) for reason in REASONS}
    assert waits == {reason: WAITS.get(reason, 0) for reason in REASONS}
    assert found["vllm:pie_pool_bytes"] == geometry.bytes_of_chunks(2)
    assert found["vllm:pie_pool_ceiling_bytes"] == geometry.host_bytes
    wanted = {f"vllm:{name}" for name in GAUGES}
    wanted |= {f"vllm:{name}_total" for name in (*COUNTERS, *BY_REASON)}
    assert set(found) == wanted


def test_without_pie_there_are_no_such_metrics(model: Path) -> None:
    """Merely installed, the plugin exports nothing."""
    StatLoggerManager(config(model))
    assert exported() == {}


def test_memory_that_the_pool_could_not_have_is_counted() -> None:
    """Python users are told of it, and of what the pool has."""
    engine = Mock()
    engine.commit_chunk.side_effect = [None, TransferError("no memory")]
    geometry = scheduling.geometry(8, 40)
    keeper = PoolKeeper(engine, geometry.chunk_rows, idle_seconds=60)
    worker = PieWorkerMixin()
    worker._pie_geometry = geometry
    worker.pie = SimpleNamespace(totals=Totals(), keeper=keeper)  # type: ignore[assignment]
    assert worker.pie_counters()["pool_refused"] == 0
    keeper.follow(PoolOrder(4))
    deadline = time.monotonic() + 10
    while not worker.pie_counters()["pool_refused"]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    keeper.close()
    found = worker.pie_counters()
    assert found["pool_refused"] == 1
    assert found["pool_bytes"] == geometry.bytes_of_chunks(2)


@pytest.mark.slow
def test_python_users_see_what_the_engine_counted(engines: Engines, few: Path) -> None:
    """`LLM.get_metrics()` after a load that pooled, against the engine's own counters."""
    layers = len(LAYERS)
    setup = Setup(few, layers, 24, 60, dtype="float32", other={"disable_log_stats": False})
    load = [round_([request(text, max_tokens=24) for text in chats(16, 4, 8)])]
    (record,) = engines.run(setup, load)
    metrics, counters = record["metrics"], record["counters"]
    assert metrics["vllm:pie_loaded_bytes"] == counters["bytes_loaded"] > 0
    assert metrics["vllm:pie_stored_bytes"] == counters["bytes_stored"] > 0
    assert metrics["vllm:pie_streaming_steps"] == counters["steps"]
    streaming = metrics["vllm:pie_streaming_seconds"]
    assert 0 <= metrics["vllm:pie_stall_seconds"] < streaming
    assert 0 <= metrics["vllm:pie_slowed_seconds"] < streaming
    assert metrics["vllm:pie_demoted_blocks"] * setup.page * layers >= counters["bytes_stored"]
    assert metrics["vllm:pie_resident_blocks"] == counters["resident_blocks"]
    assert metrics["vllm:pie_pooled_blocks"] == counters["pooled_blocks"]
    assert metrics["vllm:pie_pooled_blocks_used"] == 0
    assert metrics["vllm:pie_resident_blocks_used"] == 0

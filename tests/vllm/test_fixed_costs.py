"""What a step leaves out: the work of quiet steps, calls passed on, and most reports."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from pie_vllm.plan import StepOrders
from pie_vllm.policy.admission.candidate import Claims
from pie_vllm.policy.admission.chunk import Asked
from pie_vllm.policy.controller import Controller
from pie_vllm.vllm import settings
from pie_vllm.vllm.compat import loggers
from pie_vllm.vllm.scheduler_side import metrics
from pie_vllm.vllm.scheduler_side.schedule_view import ScheduleView
from pie_vllm.vllm.scheduler_side.scheduler import PieSchedulerMixin
from tests.helpers import scheduling
from tests.helpers.fuzz import BLOCK_SIZE, Case, make_driver, play, random_case
from tests.helpers.scheduling import Driver, make_request

pytestmark = pytest.mark.vllm

SEEDS = range(6)


def steady_case(seed: int) -> Case:
    """A random case whose decisions and memory do not depend on how often they are asked for."""
    case = random_case(seed)
    return case._replace(wavering=False, memory_seed=None)


def driver_of(case: Case) -> Driver:
    made = make_driver(case.geometry, case.memory(), case.decider(), None, **case.options)
    made.scheduler.pie_controller.pool = None
    return made


def orders_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepOrders, int]]:
    """Orders of all steps of a case, each with the number of blocks that its requests have."""
    found: list[tuple[StepOrders, int]] = []
    original = Controller.end_step

    def end_step(self: Controller, scheduled: Any, *args: Any) -> StepOrders:
        orders = original(self, scheduled, *args)
        tables = self._residency.tables
        found.append((orders, sum(len(tables[name]) for name in scheduled)))
        return orders

    with monkeypatch.context() as patch:
        patch.setattr(Controller, "end_step", end_step)
        play(driver_of(case), case)
    return found


def test_quiet_steps_order_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their work left out and with it: equal plans, step for step, and as many blocks."""
    quiet = 0
    original = Controller._end_quiet_step

    def counted(self: Controller, scheduled: Any) -> StepOrders:
        nonlocal quiet
        quiet += 1
        return original(self, scheduled)

    monkeypatch.setattr(Controller, "_end_quiet_step", counted)
    for seed in SEEDS:
        left_out = orders_of(steady_case(seed), monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(Controller, "_is_quiet", lambda *_: False)
            done = orders_of(steady_case(seed), monkeypatch)
        assert len(left_out) == len(done), seed
        for (one, _), (other, blocks) in zip(left_out, done, strict=True):
            assert one._replace(blocks=0) == other._replace(blocks=0), seed
            assert other.blocks == blocks
            assert abs(one.blocks - blocks) <= 0.05 * blocks + 8
    assert quiet > 4 * len(SEEDS)


def test_what_decodes_ask_is_counted_as_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter count, where it can be made, is the longer one."""
    quick = ScheduleView._asked_by_decodes
    compared = 0

    def asked(self: ScheduleView, step: int, last: int) -> Asked | None:
        nonlocal compared
        found = quick(self, step, last)
        if found is not None:
            with monkeypatch.context() as patch:
                patch.setattr(ScheduleView, "_asked_by_decodes", lambda *_: None)
                assert self.asked() == found
            compared += 1
        return found

    monkeypatch.setattr(ScheduleView, "_asked_by_decodes", asked)
    for seed in SEEDS:
        play(driver_of(steady_case(seed)), steady_case(seed))
    assert compared > 4 * len(SEEDS)


def test_what_running_requests_claim_is_counted_as_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same; the loop over the running requests is left out where they all decode."""
    original = ScheduleView.claims
    left_out = 0

    def claims(self: ScheduleView) -> Claims:
        nonlocal left_out
        found, known = original(self), self._all_decode
        left_out += known == self._scheduler.current_step
        self._all_decode = -1
        assert original(self) == found
        self._all_decode = known
        return found

    monkeypatch.setattr(ScheduleView, "claims", claims)
    for seed in SEEDS:
        play(driver_of(steady_case(seed)), steady_case(seed))
    assert left_out > 0


def test_reports_are_few_and_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 ms: one in ten reports, and the last one does, so increments add up."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * 0.01)
    sent: list[dict[str, int]] = []
    original = PieSchedulerMixin.make_stats

    def make_stats(self: PieSchedulerMixin, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        sent.append(dict(loggers.carry(stats)))
        return stats

    monkeypatch.setattr(PieSchedulerMixin, "make_stats", make_stats)
    driver = make_driver(scheduling.geometry(24, 16), max_num_seqs=8)
    monkeypatch.setattr(metrics, "time", clock)
    for i in range(8):
        prompt = [100 * i + t for t in range(3 * BLOCK_SIZE)]
        driver.add(make_request(f"r{i}", prompt, 60 + i, BLOCK_SIZE))
    driver.run()
    residency = driver.scheduler.kv_cache_manager.residency
    reports = [one for one in sent if "pie_demoted_blocks" in one or "pie_resident_blocks" in one]
    assert len(sent) / 20 < len(reports) < len(sent) / 3
    assert residency.demotions > 0
    assert sum(one.get("pie_demoted_blocks", 0) for one in sent) == residency.demotions
    assert sum(one.get("pie_promoted_blocks", 0) for one in sent) == residency.promotions
    last = [one for one in sent if "pie_resident_blocks_used" in one][-1]
    assert last["pie_resident_blocks_used"] == residency.residents_in_use == 0


@pytest.mark.parametrize(
    ("settings_given", "chunks"),
    [({}, 5), ({"pool_start_gib": 1e-6}, 1), ({"pool_start_gib": 100.0}, 50)],
)
def test_first_chunks(
    monkeypatch: pytest.MonkeyPatch, settings_given: dict[str, float], chunks: int
) -> None:
    """What a step of prompts can demote, as much as was asked for, or all of the pool."""
    geometry = scheduling.geometry(200, 100, 400)
    assert geometry.chunk_rows == 8
    config = settings.take({"pie": settings_given})
    of = SimpleNamespace(
        additional_config={"pie": config},
        scheduler_config=SimpleNamespace(max_num_batched_tokens=640),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    assert settings.first_chunks(of, geometry, 16) == chunks
    monkeypatch.setattr(settings, "FIRST_BYTES_MAX", 2 * 8 * geometry.row_bytes)
    assert settings.first_chunks(of, geometry, 16) == min(chunks, 2) or settings_given

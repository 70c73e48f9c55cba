"""Two steps in flight: vLLM's AsyncScheduler, the real engine, an asynchronous compute stream.

vLLM's CPU platform has no asynchronous scheduling, so the model runner is the
test's own: it writes tags layer by layer and checks every page that it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.plan import StepPlan
from tests.helpers.engine_memory import EngineMemory
from tests.helpers.fuzz import (
    BLOCK_SIZE,
    Case,
    make_driver,
    play,
    random_case,
    random_drafts,
    random_groups,
    random_groups_preempted,
    random_preemptions,
)
from tests.helpers.streams import inject

pytestmark = pytest.mark.vllm

FAULTS = ("none", "late", "torn", "late")
PAGE_BYTES = (4096, 1032, 200)
"""A page with the tags of 16 tokens; the odd ones shift each layer's boundary."""


def run(
    seed: int,
    debug: tuple[str, ...] = (),
    fault: str | None = None,
    draw: Callable[..., Case] = random_case,
    **more: int,
) -> Counter[str]:
    """Play one random case; returns how often what happened."""
    layers, slots = 3 + seed % 4, 1 + seed % 3
    case = draw(
        seed,
        asynchronous=True,
        num_layers=layers,
        ring_slots=slots,
        page_bytes=PAGE_BYTES[seed % len(PAGE_BYTES)],
        **more,
    )
    link = (None, 2e8, None)[seed % 3]
    with TransferEngine(case.geometry, link_bytes_per_s=link, debug=debug, chunks=1) as engine:
        kind = fault or FAULTS[seed % len(FAULTS)]
        if kind != "none":
            most = 0.4 if kind == "late" else 0.0
            inject(engine, kind, milliseconds=0.05, up_to=most, seed=seed)
        memory = EngineMemory(engine, BLOCK_SIZE)
        driver = make_driver(
            case.geometry, memory, case.decider(), case.pool(), check=False, **case.options
        )
        try:
            play(driver, case)
        finally:
            memory.close()
        if not debug:
            page, row = case.geometry.load_bytes, case.geometry.row_bytes
            loaded = sum(s.bytes_loaded for s in memory.stats)
            # A draft page is copied when its block is first read, or promoted.
            assert memory.pages_loaded * page <= loaded <= memory.pages_loaded * row
            assert sum(s.bytes_stored for s in memory.stats) == memory.pages_stored * row
            assert counters(engine, "load").bytes == loaded
            assert counters(engine, "store").bytes == memory.pages_stored * row
        residency = driver.scheduler.kv_cache_manager.residency
        return Counter(
            steps=driver.steps,
            pages_loaded=memory.pages_loaded,
            demotions=residency.demotions,
            promotions=residency.promotions,
            preemptions=len(driver.preemptions),
            parked=residency.parking.parked_blocks,
            restored=residency.parking.restored_blocks,
            new_weights=driver.runner.weights,
            accepted=driver.runner.accepted,
            rejected=driver.runner.rejected,
        )


def test_every_page_read_with_two_steps_in_flight_is_right() -> None:
    """Whatever the speed and order of copies, no layer reads a foreign or torn page."""
    total: Counter[str] = Counter()
    for seed in range(32):
        total += run(seed)
    assert total["steps"] > 5000
    assert total["pages_loaded"] > 10_000
    assert total["demotions"] > 500
    assert total["promotions"] > 10
    assert total["preemptions"] > 10
    assert total["parked"] > 500
    assert total["restored"] > 50
    assert total["new_weights"] > 32, "not at the end only"


def test_preempted_requests_without_a_prefix_cache_read_no_foreign_page_either() -> None:
    """Rows are freed at once when a request ends, while steps in flight may copy from them."""
    total: Counter[str] = Counter()
    for seed in range(16):
        total += run(seed, draw=random_preemptions)
    for what in ("preemptions", "parked", "restored"):
        assert total[what] > 20, what


@pytest.mark.fuzz
def test_drafts_leave_no_foreign_page_behind(fuzz_seeds: range) -> None:
    """The runner writes them and what a drafter writes behind them; others write over it."""
    total: Counter[str] = Counter()
    for seed in fuzz_seeds:
        total += run(seed, draw=random_drafts)
    for what in ("pages_loaded", "demotions", "accepted", "rejected"):
        assert total[what] > 10 * len(fuzz_seeds), what
    for what in ("promotions", "preemptions", "parked", "restored"):
        assert total[what] > len(fuzz_seeds), what


@pytest.mark.fuzz
def test_draft_layers_read_no_foreign_page(fuzz_seeds: range) -> None:
    """They have a page of each block, run behind the gates and pass none."""
    total: Counter[str] = Counter()
    for seed in fuzz_seeds:
        total += run(seed, draw=random_drafts, draft_layers=1 + seed % 2)
    for what in ("pages_loaded", "demotions", "promotions", "parked", "restored", "accepted"):
        assert total[what] > 0, what


def test_draft_pages_that_are_not_filled_are_noticed() -> None:
    with pytest.raises(AssertionError, match="reads foreign KV"):
        run(2, debug=("skip_drafts",), draw=random_drafts, draft_layers=1)


def test_groups_without_gates_read_no_foreign_page_either() -> None:
    """With one to three of them, in the regions of the pooled layers and in others."""
    total: Counter[str] = Counter()
    for seed in range(24):
        total += run(seed, draw=random_groups, extra_regions=seed % 3)
    assert total["steps"] > 2000
    assert total["pages_loaded"] > 3000
    assert total["demotions"] > 300
    assert total["promotions"] > 10


def test_what_preempted_requests_of_groups_kept_is_no_foreign_page_either() -> None:
    """Windows and states are stored behind the step in flight, and back ahead of their step."""
    total: Counter[str] = Counter()
    for seed in range(24):
        total += run(seed, draw=random_groups_preempted)
    for what in ("preemptions", "parked", "restored"):
        assert total[what] > 20, what


@pytest.mark.parametrize("flag", ["stores_after_all", "promotions_first"])
def test_copies_of_what_has_no_gates_that_come_at_any_time_are_noticed(
    monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """Negative control."""
    begin_step = TransferEngine.begin_step

    def forgetful(self: TransferEngine, plan: StepPlan, *args: Any) -> bool:
        return begin_step(self, plan._replace(**{flag: False}), *args)

    monkeypatch.setattr(TransferEngine, "begin_step", forgetful)
    for seed in range(32):
        try:
            run(seed, fault="late", draw=random_groups_preempted)
        except AssertionError as error:
            if "foreign KV" not in str(error):
                raise
            return
    pytest.fail("32 seeds did not notice")


def test_a_plan_without_stores_first_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what has no gates writes over pages that are being stored.

    The lack of the other flag does not show here, for hardly any promotion goes to a page that
    such a layer used in the step before; it shows in ``tests/engine/test_ungated.py``.
    """
    begin_step = TransferEngine.begin_step

    def forgetful(self: TransferEngine, plan: StepPlan, *args: Any) -> bool:
        return begin_step(self, plan._replace(stores_first=False), *args)

    monkeypatch.setattr(TransferEngine, "begin_step", forgetful)
    for seed in range(32):
        try:
            run(seed, fault="late", draw=random_groups, extra_regions=seed % 3)
        except AssertionError as error:
            if "foreign KV" not in str(error):
                raise
            return
    pytest.fail("32 seeds did not notice")


@pytest.mark.parametrize("debug", ["skip_loads", "skip_stores", "late_submit"])
def test_a_broken_engine_is_noticed(debug: str) -> None:
    """Negative control: without loads or stores, or with loads submitted late, pages are wrong."""
    for seed in range(16):
        try:
            run(seed, (debug,), "late")
        except AssertionError as error:
            if "foreign KV" not in str(error):
                raise
            return
    pytest.fail("sixteen seeds did not notice")

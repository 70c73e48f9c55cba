"""Two steps in flight: vLLM's AsyncScheduler, the real engine, an asynchronous compute stream.

vLLM's CPU platform has no asynchronous scheduling, so the model runner is the
test's own: it writes tags layer by layer and checks every page that it reads.
"""

from __future__ import annotations

from collections import Counter

import pytest

from pie_vllm.engine.streams import counters
from pie_vllm.engine.transfer_engine import TransferEngine
from tests.helpers.engine_memory import EngineMemory
from tests.helpers.fuzz import BLOCK_SIZE, make_driver, play, random_case
from tests.helpers.streams import inject

pytestmark = pytest.mark.vllm

FAULTS = ("none", "late", "torn", "late")
PAGE_BYTES = (4096, 1032, 200)
"""A page with the tags of 16 tokens; the odd ones shift each layer's boundary."""


def run(seed: int, debug: tuple[str, ...] = (), fault: str | None = None) -> Counter[str]:
    """Play one random case; returns how often what happened."""
    layers, slots = 3 + seed % 4, 1 + seed % 3
    case = random_case(
        seed,
        asynchronous=True,
        num_layers=layers,
        ring_slots=slots,
        page_bytes=PAGE_BYTES[seed % len(PAGE_BYTES)],
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
            page = case.geometry.row_bytes
            assert sum(s.bytes_loaded for s in memory.stats) == memory.pages_loaded * page
            assert sum(s.bytes_stored for s in memory.stats) == memory.pages_stored * page
            assert counters(engine, "load").bytes == memory.pages_loaded * page
            assert counters(engine, "store").bytes == memory.pages_stored * page
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

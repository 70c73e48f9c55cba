"""What keeps the head of the waiting queue is named, by one reason for each step that it waits."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from pie_vllm.plan import Totals
from pie_vllm.policy.admission.waits import REASONS
from pie_vllm.policy.control.elastic_pool import FREE_MARGIN, ElasticPool
from pie_vllm.vllm.scheduler_side import metrics
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, make_driver, play, random_case
from tests.helpers.scheduling import Driver, make_request

pytestmark = pytest.mark.vllm


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(997) for _ in range(count)]


def driver_of(
    resident: int, pooled: int, decider: Fixed | None = None, pool: Any = None, **options: Any
) -> Driver:
    return make_driver(
        scheduling.geometry(resident, pooled),
        decider=decider or Fixed(pooled),
        pool=pool,
        **{"max_model_len": 600, "max_num_batched_tokens": 256, **options},
    )


def holds(driver: Driver, length: int, answer: int = 40) -> None:
    """A request runs and has its first token."""
    driver.add(make_request("first", tokens(length, 1), answer, BLOCK_SIZE))
    while not driver.answers["first"]:
        driver.step()


def link() -> Driver:
    driver = driver_of(12, 30, Fixed(0))
    holds(driver, 100)
    driver.add(make_request("waits", tokens(100, 2), 5, BLOCK_SIZE))
    return driver


def window() -> Driver:
    driver = driver_of(12, 10)
    holds(driver, 200)
    driver.add(make_request("waits", tokens(150, 2), 5, BLOCK_SIZE))
    return driver


def rows() -> Driver:
    sizes = scheduling.geometry(12, 40)
    ticks = itertools.count(0.0, 2.0)
    pool = ElasticPool(sizes, 1, lambda: FREE_MARGIN, lambda: next(ticks))
    driver = driver_of(12, 40, pool=pool)
    holds(driver, 200)
    driver.add(make_request("waits", tokens(150, 2), 5, BLOCK_SIZE))
    return driver


def residents() -> Driver:
    driver = driver_of(5, 40)
    holds(driver, 20)
    for number in range(4):
        driver.add(make_request(f"{number}", tokens(9, number), 20, BLOCK_SIZE))
    return driver


def watermark() -> Driver:
    driver = driver_of(12, 10, watermark=0.3)
    holds(driver, 120)
    driver.add(make_request("waits", tokens(120, 2), 5, BLOCK_SIZE))
    return driver


def seqs() -> Driver:
    driver = driver_of(12, 10, max_num_seqs=1)
    holds(driver, 20)
    driver.add(make_request("waits", tokens(20, 2), 5, BLOCK_SIZE))
    return driver


def spent() -> Driver:
    driver = driver_of(40, 10, max_num_batched_tokens=32, max_num_scheduled_tokens=32)
    for name in ("long", "waits"):
        driver.add(make_request(name, tokens(60, 1), 5, BLOCK_SIZE))
    return driver


def restore() -> Driver:
    """Its KV comes back over a link that takes a block a step."""
    driver = driver_of(
        12, 10, Fixed(10, restore_blocks_max=1), enable_prefix_caching=True, max_num_seqs=4
    )
    driver.add(make_request("before", tokens(64, 2), 2, BLOCK_SIZE))
    driver.run()
    holds(driver, 170, 60)
    driver.abort("first")
    driver.add(make_request("beside", tokens(9, 3), 30, BLOCK_SIZE))
    driver.step()
    driver.add(make_request("waits", [*tokens(64, 2), 5], 5, BLOCK_SIZE))
    return driver


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("link", link),
        ("window", window),
        ("rows", rows),
        ("residents", residents),
        ("watermark", watermark),
        ("seqs", seqs),
        ("tokens", spent),
        ("restore", restore),
    ],
)
def test_the_reason_is_named(reason: str, make: Callable[[], Driver]) -> None:
    """By the first step in which it waits, and by nothing else in that step."""
    driver = make()
    before = dict(driver.scheduler.pie_waits.steps)
    driver.step()
    found = driver.scheduler.pie_waits.steps
    assert {r: found[r] - before[r] for r in REASONS if found[r] != before[r]} == {reason: 1}
    driver.run()
    driver.verify()


def test_nobody_waits_unnoticed() -> None:
    """In random cases: each step that leaves someone waiting has one reason, and no other has."""
    seen: set[str] = set()
    for seed in range(40):
        case = random_case(seed)
        driver = make_driver(
            case.geometry, decider=case.decider(), pool=case.pool(), **case.options
        )
        counts = driver.scheduler.pie_waits.steps
        step = driver.step

        def noted(driver: Driver = driver, counts: Any = counts, step: Any = step) -> None:
            before, steps = sum(counts.values()), driver.steps
            schedule = driver.scheduler.schedule
            left: list[int] = []

            def noting() -> Any:
                output = schedule()
                left.append(len(driver.scheduler.waiting))
                return output

            driver.scheduler.schedule = noting
            step()
            driver.scheduler.schedule = schedule
            if driver.steps > steps:
                assert sum(counts.values()) - before == (left[0] > 0)

        driver.step = noted  # type: ignore[method-assign]
        play(driver, case)
        seen |= {reason for reason, steps in counts.items() if steps}
    assert {"link", "window", "residents", "seqs", "tokens"} <= seen


def test_the_log_line_has_the_same_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Since the last line, the most frequent first."""
    driver = residents()
    for _ in range(3):
        driver.step()
    log = driver.scheduler.pie_log
    monkeypatch.setattr(metrics.logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger=metrics.logger.name):
        caplog.clear()
        log.record(Totals(steps=1))
        log.write()
        log.record(Totals(steps=2))
        log.write()
    first, second = (record.getMessage() for record in caplog.records)
    steps = driver.scheduler.pie_waits.steps["residents"]
    assert f"head_waits=residents:{steps}" in first
    assert second.endswith("head_waits=none")

"""A copy that fails costs its requests a recompute, and nobody anything else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pie_vllm.policy.flight import Flight
from pie_vllm.vllm.recovery import Recovery
from tests.helpers import fuzz, scheduling
from tests.helpers.failing import FailingMemory, HonestRunner
from tests.helpers.fuzz import BLOCK_SIZE, play, random_case
from tests.helpers.scheduling import Driver

pytestmark = pytest.mark.vllm


class LengthDriver(Driver):
    """Knows how long each answer must be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths: dict[str, int] = {}

    def add(self, request: Any) -> None:
        super().add(request)
        self.lengths[request.request_id] = request.max_tokens

    def verify(self) -> None:
        """Also that no answer lacks a token."""
        super().verify()
        for name, answer in self.answers.items():
            assert len(answer) == self.lengths[name], f"{name} lacks tokens"


def driver_of(case: fuzz.Case, share: float, seed: int) -> LengthDriver:
    """A scheduler of the case's kind, over memory whose copies fail."""
    scheduler = scheduling.make(case.geometry, BLOCK_SIZE, **case.options)
    scheduler.pie_decider = case.decider()
    scheduler.pie_pool = case.pool() or scheduler.pie_pool
    memory = FailingMemory(case.geometry, BLOCK_SIZE, share, seed)
    in_flight = 1 + case.options["async_scheduling"]
    return LengthDriver(scheduler, HonestRunner(memory, BLOCK_SIZE), in_flight=in_flight)


def run(seed: int, share: float = 0.03, asynchronous: bool | None = None) -> Counter[str]:
    """Play one random case; returns how often what happened."""
    case = random_case(seed, asynchronous=asynchronous)
    driver = driver_of(case, share, seed)
    play(driver, case)
    scheduler, memory = driver.scheduler, driver.runner.memory
    assert scheduler.pie_recovery.failures == memory.failures
    parking = scheduler.kv_cache_manager.residency.parking
    return Counter(
        steps=driver.steps,
        failures=memory.failures,
        demotions=scheduler.kv_cache_manager.residency.demotions,
        parked=parking.parked_blocks,
        restored=parking.restored_blocks,
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_answers_are_right_whatever_fails(asynchronous: bool) -> None:
    """One step and two in flight; the books agree after each, and nothing is lost."""
    total: Counter[str] = Counter()
    for seed in range(24):
        total += run(seed, asynchronous=asynchronous)
    print(total)
    assert total["failures"] > 50

"""Schedulers whose worker takes and gives back the pool's memory at its own pace."""

from __future__ import annotations

from typing import Any

import pytest

from pie_vllm.geometry import Geometry
from pie_vllm.plan import StepReport
from tests.helpers import scheduling
from tests.helpers.deciders import Fixed
from tests.helpers.fuzz import BLOCK_SIZE, make_driver
from tests.helpers.parked_chats import (
    POOLED,
    RESIDENT,
    ROWS,
    cached_tokens,
    chat_then_others,
    driver,
)
from tests.helpers.scheduling import Driver, make_request
from tests.helpers.tagrunner import DictMemory

pytestmark = pytest.mark.vllm

CHUNK_ROWS = 8


class Paced(DictMemory):
    """A worker that takes a chunk every so many steps, and has memory for so many of them.

    Attributes:
        every: steps from one chunk to the next.
        most: chunks that can be had.
        wanted_most: the most that was ordered.
    """

    def __init__(self, geometry: Geometry, every: int = 1, most: int = 1000) -> None:
        super().__init__(geometry, BLOCK_SIZE)
        self.every, self.most = every, most
        self.wanted_most = 1
        self._steps = 0

    def take_and_give(self) -> None:
        """Called twice a step."""
        self._steps += 1
        self.wanted_most = max(self.wanted_most, self.order.chunks)
        if self.chunks < self.order.chunks and self._steps % (2 * self.every) == 0:
            if self.chunks < self.most:
                self.chunks += 1
            else:
                self.refused += 1


def parked_sizes() -> Geometry:
    """Those of ``driver`` with rows that come and go."""
    return scheduling.geometry(RESIDENT, POOLED, ROWS, chunk_rows=CHUNK_ROWS)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("when", ["kept", "before the step", "while it is queued"])
def test_after_an_idle_time_the_first_step_asks_what_is_there(
    asynchronous: bool, when: str
) -> None:
    """It names no row. Then the chat is restored, or all of it is computed again."""
    memory = DictMemory(parked_sizes(), BLOCK_SIZE)
    made = driver(memory, chunk_rows=CHUNK_ROWS, async_scheduling=asynchronous)
    history = chat_then_others(made)
    residency = made.scheduler.kv_cache_manager.residency
    assert residency.rows.chunks_held > 2
    if when == "before the step":
        memory.expire()
    made.add(make_request("next", [*history, 1, 2, 3], 5, BLOCK_SIZE))
    if when == "while it is queued":
        execute = made.runner.execute

        def late(output: Any) -> Any:
            made.runner.execute = execute  # type: ignore[method-assign]
            memory.expire()
            return execute(output)

        made.runner.execute = late  # type: ignore[method-assign]
    made.step()
    assert made.output.total_num_scheduled_tokens == 0
    assert made.output.pie.plan is None
    made.run_until(lambda: made.output.total_num_scheduled_tokens > 0, 3)
    whole = (len(history) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert cached_tokens(made, "next") == (whole if when == "kept" else 0)
    made.run()
    made.verify()
    assert memory.released == (when != "kept")


def test_nothing_is_asked_while_requests_run_or_nothing_is_there_to_lose() -> None:
    """An order gives leave only when the engine has nothing to run."""
    memory = DictMemory(parked_sizes(), BLOCK_SIZE)
    made = driver(memory, chunk_rows=CHUNK_ROWS)
    made.add(make_request("one", list(range(60)), 5, BLOCK_SIZE))
    made.step()
    while made.scheduler.requests:
        assert made.output.total_num_scheduled_tokens > 0
        assert not made.output.pie.pool.idle
        made.step()
    made.run()
    assert memory.order.idle or memory.order.chunks == 1
    made.add(make_request("two", list(range(60)), 5, BLOCK_SIZE))
    made.step()
    assert made.output.total_num_scheduled_tokens > 0, "at most the first chunk holds anything"


def many(memory: Paced, **options: Any) -> Driver:
    """More requests than residents, which all fit both tiers."""
    sizes = scheduling.geometry(12, 80)
    made = make_driver(
        sizes,
        memory,
        Fixed(80),
        max_model_len=400,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
        **options,
    )
    for i in range(6):
        made.add(make_request(f"r{i}", [100 * i + j for j in range(150)], 30, BLOCK_SIZE))
    return made


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("every", [3, 6])
def test_rows_on_their_way_change_no_schedule(asynchronous: bool, every: int) -> None:
    """The schedule pauses for them where it needs them; nobody is preempted for their sake."""

    def schedule(pace: int) -> list[dict[str, int]]:
        memory = Paced(scheduling.geometry(12, 80), pace)
        made = many(memory, async_scheduling=asynchronous)
        found = []
        while made.scheduler.has_requests() or made.queue:
            before = made.steps
            made.step()
            if made.steps > before and made.output.num_scheduled_tokens:
                found.append(dict(made.output.num_scheduled_tokens))
            assert made.steps < 1000
        made.verify()
        assert not made.preemptions
        assert memory.chunks > 4
        assert bool(made.scheduler.pie_controller.pool.pauses) == (pace > 1)
        return found

    assert schedule(every) == schedule(1)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_chunks_that_cannot_be_had_make_the_pool_smaller(most: int) -> None:
    """Requests wait or are preempted; all are answered, and no row beyond is named."""
    memory = Paced(scheduling.geometry(12, 80), most=most)
    made = many(memory)
    made.run()
    made.verify()
    assert memory.refused
    assert memory.chunks <= most
    assert made.scheduler.pie_controller.pool.usable <= most


def test_outputs_without_a_report_hold_nobody_up() -> None:
    """Then the first chunk is all that is counted on."""
    memory = Paced(scheduling.geometry(12, 80))
    made = many(memory)
    execute = made.runner.execute

    def silent(output: Any) -> Any:
        result = execute(output)
        assert isinstance(result.pie, StepReport)
        del result.pie
        return result

    made.runner.execute = silent  # type: ignore[method-assign]
    made.run()
    made.verify()
    assert made.scheduler.pie_controller.pool.usable == 1

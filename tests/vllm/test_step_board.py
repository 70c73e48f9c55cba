"""What the ranks tell each other of a step reaches the one whose output vLLM returns."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.outputs import ModelRunnerOutput

from pie_vllm.errors import CopyError, IntegrityError, TransferError
from pie_vllm.plan import NO_RUNS, PoolOrder, PoolState, StepOrders, StepPlan, Totals
from pie_vllm.vllm.worker_side import ranks, step_board
from pie_vllm.vllm.worker_side.step_board import STEPS, TEXT_BYTES, StepBoard
from pie_vllm.vllm.worker_side.worker import PieWorkerMixin

pytestmark = pytest.mark.vllm


def boards(folder: Path, number: int = 2) -> list[StepBoard]:
    """One of each rank, over one file."""
    path = folder / "steps"
    memories = [StepBoard.create(path, number)]
    memories += [StepBoard.join(path, number) for _ in range(number - 1)]
    return [StepBoard(memory, rank, number) for rank, memory in enumerate(memories)]


def test_each_rank_hears_of_the_others(tmp_path: Path) -> None:
    """Of the step asked for alone, whichever was the newest."""
    first, *others = boards(tmp_path, 3)
    assert first.leads
    assert not any(board.leads for board in others)
    for step in (1, 2, 3):
        first.post(step)
        others[0].post(step)
        others[1].post(step, "a copy broke" if step == 2 else "")
    assert [first.failure(step) for step in (1, 2, 3)] == ["", "on rank 2: a copy broke", ""]
    assert others[1].failure(2) == ""
    others[0].post(4, "é" * TEXT_BYTES)
    others[1].post(4)
    assert first.failure(4) == "on rank 1: " + "é" * (TEXT_BYTES // 2)


def test_a_rank_that_is_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while."""
    first, second = boards(tmp_path)
    second.post(1)

    def late() -> None:
        time.sleep(0.05)
        second.post(2, "broken")

    thread = threading.Thread(target=late)
    thread.start()
    assert first.failure(2) == "on rank 1: broken"
    thread.join()
    monkeypatch.setattr(step_board, "WAIT_SECONDS", 0.01)
    with pytest.raises(TransferError, match=r"rank 1 has not ended step 3"):
        first.failure(3)


def test_a_step_that_is_too_old_is_not_taken_for_right(tmp_path: Path) -> None:
    """Its word is that of a newer step by then."""
    first, second = boards(tmp_path)
    second.post(1, "broken")
    second.post(1 + STEPS)
    with pytest.raises(IntegrityError, match="ahead of step 1"):
        first.failure(1)


def _play(path: Path, steps: int, seed: int, gone: Any) -> None:
    board, rng = StepBoard(StepBoard.join(path, 2), 1, 2), random.Random(seed)
    for step in range(1, steps + 1):
        gone.acquire()
        board.post(step, f"step {step}" if rng.random() < 0.3 else "")


def test_two_processes(tmp_path: Path) -> None:
    """Thousands of steps, up to two in flight: each failure is heard with its step."""
    steps, seed, path = 3000, 5, tmp_path / "steps"
    board = StepBoard(StepBoard.create(path, 2), 0, 2)
    context = get_context("fork")
    in_flight = context.Semaphore(2)
    other = context.Process(target=_play, args=(path, steps, seed, in_flight), daemon=True)
    other.start()
    rng, wrong = random.Random(seed), []
    for step in range(1, steps + 1):
        found, failed = board.failure(step), rng.random() < 0.3
        if bool(found) != failed:
            wrong.append(step)
        in_flight.release()
    other.join()
    assert wrong == []


def test_ranks_agree_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them opens the file that the first has made, and no name of it is left."""
    shared = threading.Barrier(3)
    made: list[StepBoard] = []
    mine = threading.local()

    def least(*values: float) -> tuple[float, ...]:
        shared.wait(10)
        return values if values == (0.0,) else (17.0,)

    def join(rank: int) -> None:
        mine.rank = rank
        board = ranks.step_board()
        assert board is not None
        made.append(board)

    class Group:
        world_size = 3

        @property
        def rank_in_group(self) -> int:
            return int(mine.rank)

    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", Group)
    monkeypatch.setattr(ranks, "least", least)
    monkeypatch.setattr(ranks, "SHARED_MEMORY", tmp_path)
    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*tmp_path.iterdir()] == []
    lead = next(board for board in made if board.leads)
    for board in made:
        board.post(5, "" if board.leads else "broken")
    assert lead.failure(5) == "on rank 1: broken"


class Stock:
    """A worker that answers every step."""

    def execute_model(self, _: Any) -> ModelRunnerOutput:
        return ModelRunnerOutput(req_ids=[], req_id_to_index={})


class Rank(PieWorkerMixin, Stock):
    """Pie's worker, whose copies fail in the steps named."""

    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))

    def __init__(self, board: StepBoard, failing: set[int]) -> None:
        keeper = SimpleNamespace(follow=lambda _: None, state=PoolState(1))
        engine = SimpleNamespace(keeper=keeper, totals=Totals(), failure=None)

        @contextmanager
        def step(plan: StepPlan | None, _: int) -> Iterator[None]:
            engine.failure = CopyError("broken") if plan and plan.step in failing else None
            yield

        engine.step = step
        self.pie: Any = engine
        self._pie_step_board = board

    def failure(self, plan: StepPlan | None) -> str:
        """What the report of a step says."""
        orders = StepOrders(plan, PoolOrder(1))
        output = self.execute_model(SimpleNamespace(total_num_scheduled_tokens=0, pie=orders))
        return str(output.pie.failure)


def test_workers_post_each_step_and_the_leader_reports_it(tmp_path: Path) -> None:
    """Steps without a plan have no copies, and no rank waits for another in them."""
    lead, other = map(Rank, boards(tmp_path), ({3}, {2, 3}))
    for number, ours, theirs in (
        (1, "", ""),
        (2, "on rank 1: broken", "broken"),
        (3, "broken", "broken"),
        (4, "", ""),
    ):
        plan = StepPlan(number, NO_RUNS, NO_RUNS, NO_RUNS, (), forward=True)
        assert other.failure(plan) == theirs
        assert lead.failure(plan) == ours
    assert lead.failure(None) == ""

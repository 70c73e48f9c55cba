"""Plans on vLLM's own way to its workers: the message queue of the multiprocess executor."""

from __future__ import annotations

import threading

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.core.sched.output import SchedulerOutput

from pie_vllm.engine.native import PlanArrays
from pie_vllm.plan import NO_RUNS, Copy, PoolOrder, StepOrders, StepPlan, runs

pytestmark = pytest.mark.vllm

SLOTS = 2
MANY = 50_000
"""Pieces of a plan of more than 1 MiB, which the queue sends beside the pickled object."""


@pytest.fixture
def queues() -> tuple[MessageQueue, list[MessageQueue]]:
    """A queue for two ranks, of as few slots as there can be: its writer, and the readers."""
    writer = MessageQueue(2, 2, max_chunk_bytes=8 << 20, max_chunks=SLOTS)
    readers = [MessageQueue.create_from_handle(writer.export_handle(), rank) for rank in range(2)]
    threads = [threading.Thread(target=reader.wait_until_ready) for reader in readers]
    for thread in threads:
        thread.start()
    writer.wait_until_ready()
    for thread in threads:
        thread.join()
    return writer, readers


def output(step: int, pieces: int) -> SchedulerOutput:
    """What a scheduler sends with a plan of that many pieces."""
    loads = runs(Copy(2 * i, (i + step) % MANY, 1) for i in range(pieces))
    found = SchedulerOutput.make_empty()
    plan = StepPlan(step, NO_RUNS, runs([Copy(step, 0, 1)]), loads, (), forward=True)
    found.pie = StepOrders(plan, PoolOrder(1), blocks=7)
    return found


@pytest.mark.parametrize("pieces", [0, 1, 1_000, MANY])
def test_plans_arrive_at_each_rank_as_they_were_sent(
    queues: tuple[MessageQueue, list[MessageQueue]], pieces: int
) -> None:
    """What a worker keeps of them stays, too, when the queue's memory is used again."""
    writer, readers = queues
    sent, kept = [], []
    for step in range(1, 3 * SLOTS):
        sent.append(output(step, pieces))
        writer.enqueue(sent[-1])
        kept.append([reader.dequeue(timeout=10) for reader in readers])
    for one, others in zip(sent, kept, strict=True):
        for other in others:
            assert other.pie == one.pie
            arrays = PlanArrays(other.pie.plan)
            assert arrays.struct.num_loads == pieces
            assert other.pie.plan.loads.flags.aligned

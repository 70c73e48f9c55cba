"""A stall goes to the step that it is of, whenever it is told."""

from __future__ import annotations

from pie_vllm.policy.detector import Observation
from pie_vllm.policy.stalls import AwaitedStalls, speed_of_finished


def seen(requests: int) -> Observation:
    return Observation(requests, requests, 1.0)


def test_a_stall_goes_to_its_step() -> None:
    awaited = AwaitedStalls()
    for step in range(1, 7):
        awaited.add(step, seen(step), step % 2 == 0)
    assert awaited.take(4, 0.25) == (seen(4)._replace(stall_seconds=0.25), True)
    assert len(awaited) == 2, "earlier ones were not timed"
    assert awaited.take(4, 0.25) is None
    assert awaited.take(2, 0.25) is None
    assert awaited.take(5, 0.5) == (seen(5)._replace(stall_seconds=0.5), False)


def test_the_link_is_as_fast_as_what_finished() -> None:
    assert speed_of_finished(100, 400, 2.0) == 0.5
    assert speed_of_finished(100, 0, 2.0) == 0.0
    assert speed_of_finished(0, 400, 2.0) == 0.0

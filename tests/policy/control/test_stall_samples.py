"""A stall goes to the step that it is of, whenever it is told."""

from __future__ import annotations

from pie_vllm.policy.control.detector import Observation
from pie_vllm.policy.control.stall_samples import MOST_WAITING, AwaitedStalls, speed_of_finished


def seen(loaded: int) -> Observation:
    return Observation(8, 8, 1.0, bytes_loaded=loaded)


def test_a_stall_goes_to_its_step_and_by_the_byte_to_those_before() -> None:
    awaited = AwaitedStalls()
    for step, loaded in ((1, 100), (2, 0), (3, 900), (4, 200), (5, 300)):
        awaited.add(step, seen(loaded), step % 2 == 0)
    found = awaited.take(4, 0.25)
    assert [(known.bytes_loaded, known.stall_seconds) for known, _ in found] == [
        (100, 0.125),
        (0, 0.0),
        (900, 1.0),  # No longer than the step.
        (200, 0.25),
    ]
    assert [within for _, within in found] == [False, True, False, True]
    assert len(awaited) == 1
    assert awaited.take(4, 0.25) == awaited.take(2, 0.25) == []
    assert awaited.take(5, 0.5) == [(seen(300)._replace(stall_seconds=0.5), False)]


def test_a_timed_step_that_loaded_nothing_says_nothing_of_others() -> None:
    awaited = AwaitedStalls()
    awaited.add(1, seen(100), True)
    awaited.add(2, seen(0), True)
    assert [known.stall_seconds for known, _ in awaited.take(2, 0.5)] == [0.0, 0.5]


def test_steps_are_not_collected_for_ever() -> None:
    """Where no step is timed any more, the oldest are given back without their stall."""
    awaited = AwaitedStalls()
    given: list[Observation] = []
    for step in range(2 * MOST_WAITING):
        awaited.add(step, seen(step), True)
        given += awaited.overdue()
    assert [each.bytes_loaded for each in given] == list(range(MOST_WAITING))
    assert len(awaited) == MOST_WAITING
    assert awaited.overdue() == []
    assert len(awaited.take(2 * MOST_WAITING - 1, 0.5)) == MOST_WAITING


def test_the_link_is_as_fast_as_what_finished() -> None:
    assert speed_of_finished(100, 400, 2.0) == 0.5
    assert speed_of_finished(100, 0, 2.0) == 0.0
    assert speed_of_finished(0, 400, 2.0) == 0.0

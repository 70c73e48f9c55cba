"""Turns: the budget holds, nobody starves, and something always runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_vllm.policy.control.turns import LONGEST_WAIT, Turns

BLOCKS = st.frozensets(st.integers(0, 40), min_size=1, max_size=12)
POOLED = st.dictionaries(st.sampled_from([f"r{i}" for i in range(8)]), BLOCKS, min_size=1)


def step(
    turns: Turns,
    pooled: dict[str, frozenset[int]],
    budget: int,
    spare: int = 0,
    others: bool = True,
) -> tuple[list[str], bool]:
    """Choose, run who was chosen, and return who ran and whether one exceeds the budget."""
    out, exceeds = turns.choose(pooled, budget, spare, others)
    assert len(set(out)) == len(out)
    assert set(out) <= pooled.keys()
    ran = [r for r in pooled if r not in out]
    turns.ran(ran)
    return ran, exceeds


@given(POOLED, st.integers(0, 40), st.integers(0, 20), st.booleans(), st.integers(1, 20))
def test_the_budget_holds_unless_one_runs_alone(
    pooled: dict[str, frozenset[int]], budget: int, spare: int, others: bool, steps: int
) -> None:
    """What runs is within the budget, or is one request, paid by the spare or with nobody else."""
    turns = Turns()
    for _ in range(steps):
        ran, exceeds = step(turns, pooled, budget, spare, others)
        loaded = frozenset[int]().union(*(pooled[r] for r in ran))
        assert exceeds == (len(loaded) > budget)
        if exceeds:
            assert len(ran) == 1
            assert len(loaded) <= budget + spare or not others
        assert ran or others


@given(POOLED, st.integers(1, 40), st.booleans())
def test_whoever_fits_runs_at_least_once_in_as_many_steps_as_there_are_requests(
    pooled: dict[str, frozenset[int]], budget: int, others: bool
) -> None:
    """The starvation bound of the class."""
    turns = Turns()
    fitting = {r for r, blocks in pooled.items() if len(blocks) <= budget}
    runs = [set(step(turns, pooled, budget, 0, others)[0]) for _ in range(4 * len(pooled))]
    for first in range(3 * len(pooled)):
        assert fitting <= set().union(*runs[first : first + len(pooled)])


def test_a_newcomer_queues_behind_the_others() -> None:
    """A stream of new requests does not keep an older one from its turn."""
    turns = Turns()
    pooled = {name: frozenset({i}) for i, name in enumerate("abc")}
    assert step(turns, pooled, 1)[0] == ["a"]
    pooled["d"] = frozenset({9})
    assert [step(turns, pooled, 1)[0] for _ in range(4)] == [["b"], ["c"], ["a"], ["d"]]


def test_a_large_request_waits_for_the_spare_and_is_then_first() -> None:
    """It runs alone, out of what was saved up, and not again before there is more."""
    turns = Turns()
    pooled = {"large": frozenset(range(10)), "small": frozenset({20})}
    assert step(turns, pooled, 3, spare=2) == (["small"], False)
    assert step(turns, pooled, 3, spare=7) == (["large"], True)
    assert step(turns, pooled, 3, spare=7)[0] == ["small"]


def test_no_priority_keeps_a_request_from_its_turn_for_ever() -> None:
    """Two of high priority fill the link; those of low one wait for a bounded time, in order."""
    turns, waited = Turns(), dict.fromkeys("abcd", 0)
    pooled = {name: frozenset({2 * i, 2 * i + 1}) for i, name in enumerate("abcd")}
    longest = dict(waited)
    for _ in range(5 * LONGEST_WAIT):
        out, exceeds = turns.choose(pooled, 4, 0, True, lambda name: int(name in "cd"))
        assert not exceeds
        turns.ran(name for name in pooled if name not in out)
        waited = {name: waited[name] + 1 if name in out else 0 for name in pooled}
        longest = {name: max(longest[name], waited[name]) for name in pooled}
    assert max(longest["a"], longest["b"]) <= 2
    assert LONGEST_WAIT <= longest["c"] <= LONGEST_WAIT + 4
    assert LONGEST_WAIT <= longest["d"] <= LONGEST_WAIT + 4


def test_a_large_request_does_not_wait_for_ever_for_a_spare_that_never_comes() -> None:
    """It takes two budgets and a half: three times the wait, and a hundredth of the time."""
    turns = Turns()
    pooled = {"large": frozenset(range(10)), "small": frozenset({20})}
    ran = [step(turns, pooled, 4)[0] for _ in range(10 * LONGEST_WAIT)]
    at = [number for number, names in enumerate(ran) if "large" in names]
    assert all(ran[number] == ["large"] for number in at)
    waits = [later - before for before, later in zip([0, *at], at, strict=False)]
    assert all(3 * LONGEST_WAIT <= wait <= 3 * LONGEST_WAIT + 3 for wait in waits)
    assert len(at) == 3


def test_large_requests_take_turns_when_nobody_else_runs() -> None:
    """Capacity beats refusal."""
    turns = Turns()
    pooled = {"a": frozenset(range(10)), "b": frozenset(range(10, 20))}
    runs = [step(turns, pooled, 0, others=False) for _ in range(4)]
    assert runs == [(["a"], True), (["b"], True), (["a"], True), (["b"], True)]


def test_shared_blocks_count_once() -> None:
    """Requests over one prefix fit together."""
    turns = Turns()
    prefix = frozenset(range(5))
    pooled = {"a": prefix | {10}, "b": prefix | {11}}
    assert step(turns, pooled, 7)[0] == ["a", "b"]


def test_priority_goes_before_turns() -> None:
    """The more urgent request runs in every step, as in vLLM's own queue."""
    turns = Turns()
    pooled = {"late": frozenset({1}), "urgent": frozenset({2})}
    for _ in range(3):
        out, _ = turns.choose(pooled, 1, 0, True, {"late": 5, "urgent": 0}.__getitem__)
        assert out == ["late"]
        turns.ran(["urgent"])

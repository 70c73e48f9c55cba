"""What a step may still take back of its tokens."""

from __future__ import annotations

from pie_vllm.policy.speculation import NO_SPECULATION, DraftsInFlight, Speculation


def test_sizes_of_a_step() -> None:
    """A request takes slots for its token, its drafts and what a drafter writes behind them."""
    assert (NO_SPECULATION.tokens_max, NO_SPECULATION.blocks_max(16)) == (1, 1)
    eagle = Speculation(drafts=3, lookahead=3)
    assert (eagle.tokens_max, eagle.blocks_max(16), eagle.blocks_max(4)) == (4, 1, 2)


def test_drafts_are_uncertain_until_their_step_is_back() -> None:
    """Of two steps in flight, too, and of requests that the second one leaves out."""
    drafts, first, second = DraftsInFlight(), object(), object()
    assert drafts.submitted(first, {"a": [1, 2], "b": [3]}) == 3
    assert drafts.submitted(second, {"a": [4]}) == 1
    assert drafts.by_request == {"a": 3, "b": 1}
    assert (drafts.of_step(first), drafts.of_step(second), drafts.of_step(object())) == (3, 1, 0)
    drafts.landed(first)
    assert [drafts.uncertain(name) for name in "abc"] == [1, 0, 0]
    drafts.landed(object())
    assert drafts.uncertain("a") == 1
    drafts.landed(second)
    assert drafts.by_request == {}


def test_a_step_whose_results_never_come_is_forgotten() -> None:
    """With the next one that is back, or when all in flight are lost."""
    drafts, lost, back = DraftsInFlight(), object(), object()
    drafts.submitted(lost, {"a": [1]})
    drafts.submitted(back, {"a": [2]})
    drafts.landed(back)
    assert drafts.uncertain("a") == 0
    drafts.submitted(lost, {"a": [1]})
    drafts.clear()
    assert drafts.uncertain("a") == 0


def test_what_a_drafter_writes_again_is_never_certain() -> None:
    """The last tokens, which several modules of a draft model see one after the other."""
    assert DraftsInFlight(rewritten=2).uncertain("any") == 2

"""Completions: nobody who completes a block is missed, and few others are asked."""

from __future__ import annotations

import random

import pytest

from pie_vllm.policy.completions import Completions


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("left_out", [0.0, 0.4])
def test_every_completed_block_is_noticed_in_its_step(block_size: int, left_out: float) -> None:
    """Whatever comes, is left out, restarts or goes, a full block is known when its step ends."""
    rng = random.Random(block_size)
    completions = Completions(block_size)
    tokens: dict[str, int] = {}
    asked = steps = 0
    for _ in range(600):
        due = completions.next_step()
        done: dict[str, int] = {}
        for request_id in list(tokens):
            if rng.random() < 0.01:
                completions.forget(request_id)
                del tokens[request_id]
            elif rng.random() >= left_out:
                done[request_id] = rng.randint(2, 40) if rng.random() < 0.02 else 1
        assert len(set(due)) == len(due)
        for request_id, count in done.items():
            before = tokens[request_id] // block_size
            tokens[request_id] += count
            if tokens[request_id] // block_size > before:
                assert count > 1 or request_id in due
        several = [r for r, count in done.items() if count > 1]
        for request_id in {*due, *several} & tokens.keys():
            completions.expect(request_id, tokens[request_id])
        if rng.random() < 0.2:
            name = f"r{rng.randint(0, 30)}"
            if name in tokens:
                completions.forget(name)
            tokens[name] = rng.randint(1, 50)
            completions.expect(name, tokens[name])
        asked += len(due)
        steps += len(done)
    if not left_out:
        assert asked <= steps / block_size + 600 * 0.5


def test_a_request_that_went_is_not_asked() -> None:
    """Old expectations die with the request, also when one of the same name returns."""
    completions = Completions(4)
    completions.expect("a", 2)
    completions.forget("a")
    completions.expect("a", 0)
    assert [completions.next_step() for _ in range(4)] == [[], [], [], ["a"]]

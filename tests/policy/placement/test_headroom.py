"""Headroom: residents that are made free ahead of their use."""

from __future__ import annotations

from pie_vllm.policy.placement.headroom import demoted_at_once


def test_few_running_requests_have_nothing_demoted_ahead() -> None:
    """It would be loaded for steps in which its page is of no use."""
    assert [demoted_at_once(running, 16) for running in (1, 127, 128, 256, 1000)] == [
        1, 1, 32, 64, 64,
    ]  # fmt: skip

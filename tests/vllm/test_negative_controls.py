"""Breaking one part of the mechanism must show: in other tokens, or in an error.

Without these, equal tokens could mean that nothing was pooled at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engine import EngineError, Engines, Setup, request, round_
from tests.helpers.engine_load import chats, tokens
from tests.helpers.engine_model import LAYERS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def setup(few: Path) -> Setup:
    return Setup(few, len(LAYERS), 18, 60, dtype="float32")


@pytest.fixture(scope="module")
def rounds() -> list[dict[str, Any]]:
    return [round_([request(text, max_tokens=16) for text in chats(12, 4, 8)])]


@pytest.fixture(scope="module")
def right(engines: Engines, setup: Setup, rounds: list[dict[str, Any]]) -> list[Any]:
    """Stock's tokens."""
    return tokens(engines.run(setup, rounds, "stock")[0])


@pytest.mark.parametrize("debug", [(), ("poison",)])
def test_sound_engine_is_exact(
    engines: Engines, setup: Setup, rounds: list[dict[str, Any]], right: list[Any], debug: Any
) -> None:
    """Also when every pooled page is poisoned before it is filled: none is read before."""
    (pie,) = engines.run(replace(setup, debug=debug), rounds)
    assert tokens(pie) == right
    assert pie["moved"]["bytes_loaded"] > 0


@pytest.mark.parametrize(
    "broken",
    [
        {"debug": ("skip_loads",)},
        {"debug": ("skip_stores",)},
        {"debug": ("poison", "skip_loads")},
        # A slow link, so that the copy that nobody waits for cannot win by chance.
        {"debug": ("late_submit",), "emulated_link_gbps": 0.2},
        {"lost_relabels": True},
    ],
    ids=lambda broken: "-".join(broken.get("debug", ["lost_relabels"])),
)
def test_broken_engine_shows(
    engines: Engines,
    setup: Setup,
    rounds: list[dict[str, Any]],
    right: list[Any],
    broken: dict[str, Any],
) -> None:
    """Loads off, stores off, poison not loaded over, a wait before its record, a relabel lost."""
    (pie,) = engines.run(replace(setup, **broken), rounds)
    assert tokens(pie) != right


def test_a_write_past_its_gate_raises(
    engines: Engines, setup: Setup, rounds: list[dict[str, Any]]
) -> None:
    """A fused KV write may overtake the store of its page: the first step that stores says so."""
    wanted = (
        r"GateError: step \d+ passed 6 gates of 6; without the gate of their KV write: layers 2"
    )
    with pytest.raises(EngineError, match=wanted):
        engines.run(replace(setup, fused_write=2), rounds)


def test_skipped_gate_raises(engines: Engines, setup: Setup, rounds: list[dict[str, Any]]) -> None:
    """A layer that ran without its gate fails the step: no plausible wrong text comes back."""
    with pytest.raises(EngineError, match="GateError"):
        engines.run(replace(setup, debug=("skip_gate",)), rounds)
